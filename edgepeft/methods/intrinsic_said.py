"""Intrinsic SAID: all weights move at once, along the few random directions of a subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, selection, targets
from edgepeft.placements.fastfood import Fastfood
from edgepeft.precision import matmul_dtype


class _Projected(torch.autograd.Function):
    """``x @ W.T`` with W = scale · P v, which is made again in backward; no more is kept than x, v and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vector: Tensor, scale: Tensor, rows: int, fastfood: Fastfood) -> Tensor:
        ctx.save_for_backward(x, vector, scale)
        ctx.rows, ctx.fastfood = rows, fastfood
        dtype = matmul_dtype(x.dtype, x.device)
        return F.linear(x.to(dtype), (fastfood.project(vector) * scale).view(rows, -1).to(dtype))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, vector, scale = ctx.saved_tensors
        dtype = grad[0].dtype
        weight = (ctx.fastfood.project(vector) * scale).view(ctx.rows, -1).to(dtype)
        to_x = (grad[0] @ weight).to(x.dtype)
        del weight
        to_weight = grad[0].flatten(0, -2).t() @ x.flatten(0, -2).to(dtype)
        along = ctx.fastfood.transposed(to_weight.flatten())
        return to_x, along * scale, (along * vector).sum(), None, None


class Subspace(delta.Additive):
    """x → x ΔWᵀ with ΔW = scale · P v, where v is one parameter that all layers share and P is each layer's own."""

    scale: nn.Parameter | None

    def __init__(self, vector: nn.Parameter, scale: nn.Parameter | None, rows: int, fastfood: Fastfood) -> None:
        super().__init__()
        self.vector, self.rows, self.fastfood = vector, rows, fastfood
        self.register_parameter("scale", scale)

    def change(self, x: Tensor) -> Tensor:
        scale = self.vector.new_ones(()) if self.scale is None else self.scale
        return _Projected.apply(x, self.vector, scale, self.rows, self.fastfood)

    def weight(self) -> Tensor:
        weight = self.fastfood.project(self.vector.detach()).view(self.rows, -1)
        return weight if self.scale is None else weight * self.scale.detach()


@dataclass(frozen=True, kw_only=True)
class IntrinsicSAID(Method):
    """W + λ · P v in every layer, with one v for all layers, which starts at zero, a random P and a factor λ for each.

    P is a Fastfood transform and never stored; time and temporaries grow with the layer as the survey warns.
    The paper moves all parameters; here it is the weights of linear layers, so that a packed backbone will do.
    """

    paper = Paper(
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", 2020, "2012.13255"
    )
    kind = "reparametrised"
    version = 2  # 1 made other random numbers
    saves = ("disk",)
    narrow = {"dimension": 256}
    counts_layers = True
    learning_rate = 5e-3

    dimension: int = 1000
    """Trained numbers in all, the factors included."""
    scales: bool = True
    """Train a factor for each layer (SAID); otherwise all are 1 (DID)."""
    seed: int = 0
    """Chooses the subspace."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed."""

    def __post_init__(self) -> None:
        self.require(self.dimension >= 1, "dimension", "at least 1")
        self.require(0 <= self.seed < 2**20, "seed", "from 0 to 1048575")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        names = targets.linears(self.name, anatomy, self.targets)
        few = self.dimension - (len(names) if self.scales else 0)
        if few < 1:
            raise UsageError(
                f"{self.name}: a dimension of {self.dimension} is too small for this model.",
                f"Its {len(names)} layers take a factor each.",
                f"Use --set options.dimension={len(names) + 1} or more, or --set options.scales=false.",
            )
        vector = nn.Parameter(torch.zeros(few, device=device))
        for number, name in enumerate(names):
            linear: Any = model.get_submodule(name)
            count = linear.in_features * linear.out_features
            scale = nn.Parameter(torch.ones((), device=device)) if self.scales else None
            fastfood = Fastfood(few, count, self.seed * 4096 + number)
            delta.attach(linear, Subspace(vector, scale, linear.out_features, fastfood))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
