"""KronA_res^B: a Kronecker product and a residual beside every feed-forward sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck, kronecker


class Residual(nn.Module):
    """x → x (A ⊗ B)ᵀ + r · x with a trained number r, which starts at zero."""

    def __init__(self, product: kronecker.Product) -> None:
        super().__init__()
        self.product = product
        self.residual = nn.Parameter(torch.zeros((), device=product.a.device))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.product(x) + x * self.residual
        return added.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class KronARes(Method):
    """h → h + scale · (A ⊗ B) x + r · x, where x is what the feed-forward reads and h what it gives.

    B and r start at zero, so that training starts at the backbone.
    """

    paper = Paper("KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022, "2212.10650")
    kind = "reparametrised"
    merges = False
    obstacle = "It is linear, but stands beside a feed-forward that is not, so that no weight there can take it in."
    overhead = "a Kronecker product beside each feed-forward"
    learning_rate = 2e-3

    scale: float = 1.0
    """Factor of the Kronecker product."""

    def __post_init__(self) -> None:
        self.require(self.scale > 0, "scale", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for block in anatomy.blocks:
            part = block.sub_layers["feed_forward"]
            width = bottleneck.width(model, part)
            bottleneck.beside(model, part, Residual(kronecker.Product(width, width, 0, self.scale, device)))
