"""KronA: the change of a linear layer's weight is a Kronecker product, of full rank for few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, kronecker, selection, targets


class Kronecker(delta.Additive):
    """A product beside a linear layer of its size."""

    def __init__(self, product: kronecker.Product) -> None:
        super().__init__()
        self.product = product

    def change(self, x: Tensor) -> Tensor:
        added: Tensor = self.product(x)
        return added

    def weight(self) -> Tensor:
        return self.product.dense()


@dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """W + scale · A ⊗ B, with B starting at zero.

    With ``rank`` 8 on query and value it is what the survey measured under this name (LoKr, arXiv 2309.14859).
    """

    paper = Paper("KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022, "2212.10650")
    kind = "reparametrised"
    shardable = True
    learning_rate = 2e-3

    rank: int = 0
    """Rank of B; 0, or one that B is too small for, keeps it whole, as in the paper."""
    scale: float = 1.0
    """Factor of the change."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 0, "rank", "0 or more")
        self.require(self.scale > 0, "scale", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for name in targets.linears(self.name, anatomy, self.targets):
            linear: Any = model.get_submodule(name)
            product = kronecker.Product(linear.in_features, linear.out_features, self.rank, self.scale, device)
            delta.attach(linear, Kronecker(product))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
