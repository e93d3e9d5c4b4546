"""DoRA: the direction of a weight is changed by LoRA, its magnitude is trained on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.methods.lora import LowRank
from edgepeft.placements import delta, selection, targets
from edgepeft.precision import weight_of


class Decomposed(delta.Delta):
    """y → m / ‖V‖ · x Vᵀ + b with V = W + scale · B A; the norm is over each row of V, and is not differentiated.

    The norm is a constant in backward, as in section 4.3 of the paper, and V itself is never formed.
    """

    def __init__(self, linear: nn.Module, low: LowRank) -> None:
        super().__init__()
        self.low = low
        self.magnitude = nn.Parameter(self.norm(linear))

    @torch.no_grad()
    def norm(self, linear: nn.Module) -> Tensor:
        """‖V‖ of each row, (out,), in fp32, from ‖W‖² + 2 W·(B A) + ‖B A‖²."""
        weight, a, b = weight_of(linear), self.low.a, self.low.scale * self.low.b
        exact = torch.promote_types(weight.dtype, torch.float32)
        own = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
        crossed = (b * (weight @ a.t().to(weight.dtype))).sum(1)
        added = (b * (b @ (a @ a.t()))).sum(1)
        return (own + 2 * crossed + added).clamp_min(0).sqrt()

    def ratio(self, linear: nn.Module) -> Tensor:
        """m / ‖V‖ of each row, (out,); 1 where a row of V is zero and has no direction."""
        norm = self.norm(linear)
        empty = norm == 0
        return (self.magnitude / norm.masked_fill(empty, 1)).masked_fill(empty, 1)  # 0/0 has no gradient either

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        ratio = self.ratio(linear)
        bias: Any = linear.bias
        added = self.low.change(x)
        product = added + (output if bias is None else output - bias)  # x Vᵀ
        return output + added + product * (ratio - 1).to(product.dtype)  # exactly the output as long as ratio is 1

    def fold(self, linear: nn.Linear) -> None:
        ratio = self.ratio(linear)
        linear.weight.add_(self.low.weight()).mul_(ratio[:, None])


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """A magnitude for each output, which starts at the weight's own, times a direction that LoRA changes."""

    paper = Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353")
    kind = "reparametrised"
    shardable = True
    learning_rate = 3e-4

    rank: int = 8
    """Rank of the change of direction."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an input feature of the change is dropped in training."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.alpha > 0, "alpha", "above 0")
        self.require(0 <= self.dropout < 1, "dropout", "a probability below 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = targets.linears(self.name, anatomy, self.targets)
        targets.check_rank(self.name, self.rank, model, names)
        for name in names:
            linear: Any = model.get_submodule(name)
            low = LowRank(linear, self.rank, self.alpha / self.rank, self.dropout)
            delta.attach(linear, Decomposed(linear, low))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
