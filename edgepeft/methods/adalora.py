"""AdaLoRA: low-rank changes in the form of a singular value decomposition, whose ranks are bought from one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft import precision
from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, selection, targets
from edgepeft.precision import StoredLinear

FACTORS = ("a", "b", "e")
SMOOTHING, UNCERTAINTY_SMOOTHING = 0.85, 0.85  # beta1 and beta2 of equations 9 and 10, the authors' choice


class Triplets(delta.Additive):
    """x → scale · x Aᵀ Λ Bᵀ with A (rank, in), B (out, rank) and Λ = diag(e), which starts at zero.

    A triplet is a row of A, a column of B and its e. Buffers beside the factors hold how much the loss depends on each
    of their numbers: moving averages of |p · gradient|, and of how far it strays from its average.
    """

    def __init__(self, linear: nn.Linear | StoredLinear, rank: int, scale: float) -> None:
        super().__init__()
        device = next(iter([*linear.parameters(), *linear.buffers()])).device
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank, device=device))
        self.e = nn.Parameter(torch.zeros(rank, device=device))
        self.scale = scale
        for factor in (self.a, self.b):
            nn.init.normal_(factor, std=0.02)
        for name in FACTORS:
            for kind in ("sensitivity", "uncertainty"):
                start = torch.zeros_like(getattr(self, name))
                self.register_buffer(f"{kind}_{name}", start.detach(), persistent=False)

    def change(self, x: Tensor) -> Tensor:
        return precision.linear(precision.linear(x, self.a * (self.scale * self.e)[:, None]), self.b)

    def weight(self) -> Tensor:
        return (self.b * (self.scale * self.e)) @ self.a

    def observe(self) -> None:
        """Follow the importance of every number, from its gradient (equations 8 to 10)."""
        for name in FACTORS:
            parameter, (average, strays) = getattr(self, name), self._averages(name)
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs_()
            average.lerp_(now, 1 - SMOOTHING)
            strays.lerp_(now.sub_(average).abs_(), 1 - UNCERTAINTY_SMOOTHING)

    def importance(self) -> Tensor:
        """Of each triplet, (rank,): equation 7."""
        a, b, e = (torch.mul(*self._averages(name)) for name in FACTORS)
        return e + a.mean(1) + b.mean(0)

    def _averages(self, name: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"sensitivity_{name}"), getattr(self, f"uncertainty_{name}")

    def irregularity(self) -> Tensor:
        """How far the rows of A and the columns of B are from orthonormal: ‖A Aᵀ - 1‖ + ‖Bᵀ B - 1‖."""
        one = torch.eye(len(self.e), device=self.e.device)
        return (self.a @ self.a.t() - one).norm() + (self.b.t() @ self.b - one).norm()


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """W + (alpha / rank) · B Λ A, where the least important entries of Λ are set to zero after every update.

    How many are kept falls with the cube of the time from all to the budget. The last part of the training keeps
    those that are left. Ranks, budget, alpha, penalty and learning rate are those of the authors' example for SQuAD v2
    (README of QingruZhang/AdaLoRA); their scripts for other tasks have rates from 5e-4 to 2.2e-3.
    """

    paper = Paper("AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, "2303.10512")
    kind = "reparametrised"
    narrow = {"rank": 4, "budget": 2}
    learning_rate = 8e-4

    rank: int = 12
    """Rank of every change at first."""
    budget: int = 8
    """Mean rank of the changes in the end."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    warmup: float = 0.1
    """Share of the updates before the first rank is taken away."""
    settled: float = 0.5
    """Share of the updates, the last ones, with the final ranks."""
    orthogonality: float = 0.1
    """Weight of the penalty that keeps A and B orthonormal (gamma in the paper)."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(1 <= self.budget <= self.rank, "budget", f"from 1 to the rank, {self.rank}")
        self.require(self.alpha > 0, "alpha", "above 0")
        self.require(0 <= self.warmup < 1, "warmup", "a share below 1")
        self.require(0 <= self.settled < 1 - self.warmup, "settled", f"a share below {1 - self.warmup:g}")
        self.require(self.orthogonality >= 0, "orthogonality", "0 or more")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = targets.linears(self.name, anatomy, self.targets)
        targets.check_rank(self.name, self.rank, model, names)
        for name in names:
            linear: Any = model.get_submodule(name)
            delta.attach(linear, Triplets(linear, self.rank, self.alpha / self.rank))

    def penalty(self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        found = _triplets(model)
        return torch.stack([m.irregularity() for m in found]).sum() * (self.orthogonality / (2 * len(found)))

    @torch.no_grad()
    def after_update(self, model: nn.Module, progress: float) -> None:
        found = _triplets(model)
        if progress <= 1 - self.settled:  # afterwards importances stand still, and with them what is kept
            for module in found:
                module.observe()
        if progress <= self.warmup:
            return
        scores = torch.cat([module.importance() for module in found])
        kept = torch.zeros_like(scores).index_fill_(0, scores.topk(self.ranks_at(progress, len(found))).indices, 1.0)
        for module, mask in zip(found, kept.split(self.rank), strict=True):
            module.e.mul_(mask)

    def is_final(self, progress: float) -> bool:
        return progress >= 1 - self.settled  # before, ranks are above the budget

    def ranks_at(self, progress: float, layers: int) -> int:
        """How many triplets are kept, in all layers together (equation 12)."""
        left = 1 - (progress - self.warmup) / (1 - self.settled - self.warmup)
        return int(layers * (self.budget + (self.rank - self.budget) * min(1.0, max(0.0, left)) ** 3))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)


def _triplets(model: nn.Module) -> list[Triplets]:
    return [module for module in model.modules() if isinstance(module, Triplets)]
