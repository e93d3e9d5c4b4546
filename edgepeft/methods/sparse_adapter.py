"""SparseAdapter: large bottlenecks, most of whose weights are pruned before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError, nearest
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck, pruned
from edgepeft.placements.projection import Projection
from edgepeft.stage import Stage

SCORES: dict[str, Callable[[Projection], Tensor]] = {
    "snip": lambda dense: dense.get_buffer("sensitivity"),
    "magnitude": lambda dense: dense.weight.abs(),
    "random": lambda dense: torch.rand_like(dense.weight),
}


class Sensitivity(torch.optim.Optimizer):
    """Changes no weight: notes what the loss would lose with each, |w · ∂L/∂w| (SNIP, arXiv 1810.02340)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([parameter for parameter in model.parameters() if parameter.requires_grad], {"lr": 0.0})
        self.projections = [module for module in model.modules() if isinstance(module, Projection)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the optimizers' own signature is overloaded
        for each in self.projections:
            assert each.weight.grad is not None, "backward ran"
            each.get_buffer("sensitivity").copy_((each.weight * each.weight.grad).abs())


@dataclass(frozen=True, kw_only=True)
class SparseAdapter(Method):
    """Houlsby's adapters, four times as wide, a quarter of whose weights exist: Large-Sparse.

    With ``snip`` the first update changes nothing but tells which weights matter; the authors' code adds up several
    batches, without dropout. The share of weights that are kept is that of every matrix, the "local" scope of their
    code, whose default is "global": so only these are trained, and stored with where they are.
    """

    paper = Paper(
        "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters", 2022, "2210.04284"
    )
    kind = "additive"
    merges = False
    obstacle = bottleneck.OBSTACLE
    identity_at_start = False
    overhead = "two bottlenecks in a layer"

    reduction: int = 4
    """How many times narrower a bottleneck is than the backbone."""
    sparsity: float = 0.75
    """Share of a bottleneck's weights that are pruned."""
    score: str = "snip"
    """What tells which weights are kept: snip, magnitude or random."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(0 <= self.sparsity < 1, "sparsity", "a share below 1")
        if self.score not in SCORES:
            raise UsageError(f"sparse_adapter: there is no score {self.score!r}.", "", nearest(self.score, SCORES))

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for part in anatomy.sub_layers(("attention", "feed_forward")):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.after(model, part, bottleneck.dense(wide, size, F.gelu, device))
        if self.score == "snip":
            for module in model.modules():
                if isinstance(module, Projection):
                    module.register_buffer("sensitivity", torch.zeros_like(module.weight), persistent=False)
        else:
            self._prune(model, anatomy)

    def stages(self) -> tuple[Stage, ...]:
        train = Stage(name="train", optimizer=self.optimizer)
        if self.score != "snip":
            return (train,)
        watch = Stage(
            name="score", optimizer=lambda model, lr, weight_decay: Sensitivity(model), updates=1, measures=True
        )
        return watch, Stage(name="train", optimizer=self.optimizer, begin=self._prune)

    def _prune(self, model: nn.Module, anatomy: Anatomy) -> None:
        pruned.prune(model, 1 - self.sparsity, SCORES[self.score])
