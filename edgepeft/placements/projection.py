"""Projections whose weights are trained, stored as they are or made from tensors of other shapes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.precision import one_by_one

STD = 0.01  # of weights that start near zero: Houlsby et al., section 3.6, found 1e-7 to 1e-2 to do equally well


class Projection(nn.Module):
    """x Wᵀ + b with W (out, in) and b (out,) in fp32, cast to the dtype of x when used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


class Made(nn.Module):
    """A projection whose weight is made anew in each forward pass."""

    @abstractmethod
    def made(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) and b (out,), in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, *self.made())


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def near_zero(*shape: int, device: torch.device) -> Tensor:
    """Weights of standard deviation ``STD``, none larger than two of them."""
    return torch.empty(shape, device=device).normal_(std=STD).clamp_(-2 * STD, 2 * STD)


def condense(model: nn.Module) -> None:
    """Make every weight that is made anew once and for all: nothing is trained any more."""
    for name, module in one_by_one(model, lambda module: isinstance(module, Made)):
        with torch.no_grad():
            weight, bias = module.eval().made()
        plain: Any = Projection(weight.clone(), None if bias is None else bias.clone())
        model.set_submodule(name, plain.requires_grad_(False).eval())
