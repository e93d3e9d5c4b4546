"""AdaMix: a mixture of adapters, chosen at random in training and averaged into one afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import step
from edgepeft.anatomy import Anatomy
from edgepeft.divergence import divergence, linear_divergence
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck, projection


class Experts(projection.Made):
    """Projections of one shape: a random one in each forward pass of training, their average otherwise.

    Weights (experts, out, in), biases (experts, out). The choice is drawn from torch's generator, whose state is put
    back where activations are recomputed, and stays a tensor, so that it can be traced.
    """

    def __init__(self, experts: int, wide_in: int, wide_out: int, device: torch.device) -> None:
        super().__init__()
        start = projection.near_zero(wide_out, wide_in, device=device)
        self.weight = nn.Parameter(start.repeat(experts, 1, 1))  # only weights from one start are worth averaging
        self.bias = nn.Parameter(torch.zeros(experts, wide_out, device=device))

    def made(self) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.weight.mean(0), self.bias.mean(0)
        chosen = torch.randint(len(self.weight), (1,), device=self.weight.device)
        return self.weight.index_select(0, chosen)[0], self.bias.index_select(0, chosen)[0]


@dataclass(frozen=True, kw_only=True)
class AdaMix(Method):
    """h → h + up(gelu(down(h))) after the feed-forward, with several downs and ups that are drawn independently.

    Each microbatch is read twice, with other experts the second time; the predictions are drawn together by half the
    sum of their two Kullback-Leibler divergences. What is evaluated and exported is one adapter, the experts' average.
    Both predictions get gradients of both divergences, as the paper writes it; the authors' code holds the target of
    each fixed, so that a ``consistency`` of 1 here pulls about as one of 2 there. Their script has all experts share
    one up-projection; here each has its own, as the survey describes it, and all begin as copies of one. The learning
    rate is that script's for BERT-base (bert_base_mnli_expert_soup.sh of microsoft/AdaMix), whose adapters are as
    narrow as these; for RoBERTa-large it is 3e-4.
    """

    paper = Paper("AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", 2022, "2205.12410")
    kind = "additive"
    merges = False
    obstacle = bottleneck.OBSTACLE
    identity_at_start = False
    overhead = "a bottleneck in a layer"
    saves = ("disk",)  # two passes are in memory at once
    learning_rate = 4e-4

    reduction: int = 16
    """How many times narrower a bottleneck is than the backbone; 16 is the paper's for BERT-base."""
    experts: int = 4
    """Projections to choose from, at either end of a bottleneck."""
    consistency: float = 1.0
    """Weight of the divergence; 0 saves the second pass."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.experts >= 2, "experts", "at least 2")
        self.require(self.consistency >= 0, "consistency", "at least 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for part in anatomy.sub_layers(("feed_forward",)):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            down, up = Experts(self.experts, wide, size, device), Experts(self.experts, size, wide, device)
            bottleneck.after(model, part, bottleneck.Bottleneck(down, up, F.gelu))

    def penalty(self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        if not self.consistency:
            return None
        again = step.outputs(model, batch)
        if "labels" in batch:
            apart = divergence(outputs, again)
        else:
            whole: Any = model
            head, softcap = whole.get_output_embeddings(), getattr(whole.config, "final_logit_softcapping", None)
            apart = linear_divergence(outputs, again, head.weight, head.bias, softcap)
        return self.consistency * apart / len(outputs)
