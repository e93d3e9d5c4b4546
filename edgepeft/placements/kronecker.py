"""A trained Kronecker product that is multiplied with vectors without ever being formed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgepeft import precision


class Product(nn.Module):
    """x → scale · x (A ⊗ B)ᵀ, (..., in) to (..., out); A is random at first and B zero.

    Both sizes are split as squarely as they allow: A has the smaller part of each, (out₁, in₁), and B the larger,
    (out₂, in₂).

    Args:
        rank: B is itself a product of that rank; 0 keeps it whole.
    """

    def __init__(self, wide_in: int, wide_out: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        (out1, out2), (in1, in2) = split(wide_out), split(wide_in)
        self.scale = scale
        self.a = nn.Parameter(torch.empty(out1, in1, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        if 0 < rank < min(out2, in2):
            self.b = nn.Parameter(torch.zeros(out2, rank, device=device))
            self.inner = nn.Parameter(torch.empty(rank, in2, device=device))
            nn.init.kaiming_uniform_(self.inner, a=math.sqrt(5))
        else:
            self.b = nn.Parameter(torch.zeros(out2, in2, device=device))
            self.register_parameter("inner", None)

    def forward(self, x: Tensor) -> Tensor:
        """(A ⊗ B) x = vec(A X Bᵀ), where X (in₁, in₂) is x; the smaller of the two ways to go about it."""
        (out1, in1), (out2, in2) = self.a.shape, (len(self.b), (self.b if self.inner is None else self.inner).shape[1])
        grid = x.unflatten(-1, (in1, in2))
        if out2 * in1 * (in2 + out1) <= out1 * in2 * (in1 + out2):
            grid = precision.linear(self._times_b(grid).mT, self.a * self.scale).mT
        else:
            grid = self._times_b(precision.linear(grid.mT, self.a * self.scale).mT)
        return grid.flatten(-2)

    def _times_b(self, grid: Tensor) -> Tensor:
        return precision.linear(grid if self.inner is None else precision.linear(grid, self.inner), self.b)

    def dense(self) -> Tensor:
        """scale · A ⊗ B, (out, in)."""
        b = self.b if self.inner is None else self.b @ self.inner
        return self.scale * torch.kron(self.a, b).detach()


def split(size: int) -> tuple[int, int]:
    """The two factors of ``size`` that are nearest to each other, the smaller one first."""
    small = next(number for number in range(math.isqrt(size), 0, -1) if size % number == 0)
    return small, size // small
