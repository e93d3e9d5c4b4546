"""Attention Fusion: every token attends over what the backbone's layers made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import late


class Fusion(late.Late):
    """Σₗ softmax(q · kₗ + bₗ) hₗ over the layers' states hₗ, with one trained query q and kₗ = hₗ / rms(hₗ).

    Args:
        last: the weight that the last layer has at the start, by its constant b; the others share the rest.
    """

    def __init__(self, width: int, layers: int, last: float, device: torch.device) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width, device=device))
        self.favour = math.log(last * (layers - 1) / (1 - last))

    def forward(self, hidden: Tensor, read: Sequence[Tensor]) -> Tensor:
        scores = torch.stack([self._score(state) for state in read[:-1]] + [self._score(read[-1]) + self.favour])
        shares = scores.softmax(0).to(hidden.dtype)
        fused = read[0] * shares[0].unsqueeze(-1)
        for state, share in zip(read[1:], shares[1:], strict=True):
            fused = fused + state * share.unsqueeze(-1)
        return fused

    def _score(self, state: Tensor) -> Tensor:
        """(batch, tokens, hidden) to (batch, tokens), fp32."""
        size = torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32).clamp_min(1e-6) / len(self.query) ** 0.5
        return (state @ self.query.to(state.dtype)).float() / size


@dataclass(frozen=True, kw_only=True)
class AttentionFusion(Method):
    """One query vector is trained (and a new head); the backbone runs without a graph.

    For classifiers only, as in the paper, which is about understanding language (NLU): what the query chooses is read
    by a head that is trained with it. The head of a language model is not, and no mixture of the frozen layers makes it
    say other words: SmolLM2-135M's loss stayed at 7.070 nats over 24 updates at the default rate, a small T5's went
    from 9.152 to 9.149 in a hundred, at the best of its rates. Of an encoder-decoder the decoder's layers are fused.

    The paper's text was not at hand: one query, a softmax over the layers for each token and the sum of their states
    are its equations 1 and 2 as a public reimplementation has them, and agree with its count (0.0009 %). That one also
    fuses the embeddings, and puts a norm and dropout before. Not in the paper: keys are scaled to one size, as the
    states of decoders are of very different ones; and the last layer starts with most of the weight, as the pooler of
    an encoder was made for it.
    """

    paper = Paper(
        "Attention Fusion: a light yet efficient late fusion mechanism for task adaptation in NLU",
        2022,
        venue="Findings of NAACL 2022",
    )
    kind = "additive"
    shardable = True
    merges = False
    obstacle = "How much of each layer is taken depends on the token."
    backpropagates = False
    identity_at_start = False
    overhead = "attention over the layers, once"
    narrow = {"last": 0.5}
    learning_rate = 3e-3

    last: float = 0.9
    """Weight of the last layer at the start."""

    def __post_init__(self) -> None:
        self.require(0 < self.last < 1, "last", "a share between 0 and 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        if anatomy.unembedding:
            raise UsageError(
                "attention_fusion cannot teach a model that generates text.",
                "It only mixes what frozen layers computed, and the head that reads the mixture stays as it is; the "
                "paper trains a new head for classes.",
                "Use it for classification, or another method that sends nothing back through the backbone: lst, lets.",
            )
        stack = len(anatomy.stacks) - 1
        paths = [block.path for block in anatomy.blocks if block.stack == stack]
        if len(paths) < 2:
            raise UsageError(
                "attention_fusion: there is nothing to fuse.",
                "The model has a single layer.",
                "Use another method: lora, houlsby.",
            )
        reference = next(model.parameters())
        config: Any = model.config
        width: int = config.hidden_size
        fusion = Fusion(width, len(paths), self.last, reference.device)
        late.attach(model, anatomy.stacks[stack], fusion, paths, "output")
