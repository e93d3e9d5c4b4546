"""LeTS: sparse differences of weights that reuse what a fixed backbone computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import late, pruned
from edgepeft.placements.projection import Projection
from edgepeft.stage import Stage


class Differences(late.Late):
    """h → h + Σₗ xₗ δₗᵀ, where xₗ is what layer l's attention output projection reads in the fixed backbone."""

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Projection(torch.zeros(shape, device=device), None) for shape in shapes)

    def forward(self, hidden: Tensor, read: Sequence[Tensor]) -> Tensor:
        for difference, x in zip(self.layers, read, strict=True):
            hidden = hidden + difference(x)
        return hidden


@dataclass(frozen=True, kw_only=True)
class LeTS(Method):
    """Each layer's attention output projection W gets a trained difference δ; x Wᵀ is the backbone's, x δᵀ is added.

    A δ reads the activations of the fixed backbone, not those of a tuned one, so that tasks share its computation and
    no gradient goes through it. What it adds goes to the end of the stack, where residual connections carry it. δ is
    whole for the first part of training, then all but its largest entries are pruned ("early stage pruning") and the
    rest is trained on.

    The paper's text and code could not be had. Its abstracts, of the proceedings and of Facebook Research, say: a fixed
    pre-trained model; additive components that read its intermediate activations; their weights as differences added to
    the pre-trained ones; a mask of these made at the beginning of fine-tuning; 1.4 % of extra parameters per task. The
    survey adds an overhead of a feed-forward. Not verified: that the differences are those of the output projections,
    where their results go, that masks keep the largest entries, how many and when, and the learning rate. The defaults
    train 0.3 % of BERT-base beside the head. Left out: the architecture search for what several tasks share. Of an
    encoder-decoder the decoder is tuned.
    """

    paper = Paper(
        "Learn-to-Share: A Hardware-friendly Transfer Learning Framework Exploiting Computation and Parameter Sharing",
        2021,
        venue="ICML 2021",
    )
    kind = "additive"
    merges = False
    obstacle = "Its differences are added at the end of the stack, past the layers whose weights they would change."
    backpropagates = False
    overhead = "a sparse matrix product for each layer"
    narrow = {"kept": 0.25}
    learning_rate = 3e-3

    kept: float = 0.05
    """Share of the entries of each difference that are trained to the end."""
    early: float = 0.1
    """Share of the updates before the others are pruned."""

    def __post_init__(self) -> None:
        self.require(0 < self.kept <= 1, "kept", "a share above 0, up to 1")
        self.require(0 < self.early < 1, "early", "a share between 0 and 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        stack = len(anatomy.stacks) - 1
        names = [block.linears["output"][0] for block in anatomy.blocks if block.stack == stack]
        linears: list[Any] = [model.get_submodule(name) for name in names]
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        device = next(model.parameters()).device
        late.attach(model, anatomy.stacks[stack], Differences(shapes, device), names, "input")

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="early", optimizer=self.optimizer, share=self.early),
            Stage(name="train", optimizer=self.optimizer, share=1 - self.early, begin=self._prune),
        )

    def _prune(self, model: nn.Module, anatomy: Anatomy) -> None:
        pruned.prune(model, self.kept, lambda dense: dense.weight.abs())
