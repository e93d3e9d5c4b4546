"""Projections made of Kronecker products: parametrised hypercomplex multiplication, and its low-rank form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import SubLayer
from edgepeft.errors import UsageError
from edgepeft.placements import bottleneck
from edgepeft.placements.projection import Made

STD = 1e-4  # of the small matrices at the start: that of Compacter's authors


class Hypercomplex(Made):
    """x W + b with W = Σᵢ Aᵢ ⊗ Bᵢ, a sum of n Kronecker products (PHM layer, arXiv 2102.08597, section 3).

    Args:
        rule: A, (n, n, n), this layer's or one that layers share.
    """

    def __init__(self, rule: nn.Parameter, wide_in: int, wide_out: int) -> None:
        super().__init__()
        n = len(rule)
        self.rule = rule
        self.factor = nn.Parameter(_glorot(n, wide_in // n, wide_out // n, like=rule))
        self.bias = nn.Parameter(rule.new_zeros(wide_out))

    def made(self) -> tuple[Tensor, Tensor]:
        return kronecker_sum(self.rule, self.factor), self.bias


class LowRankHypercomplex(Made):
    """The same with Bᵢ = sᵢ tᵢ of a low rank (LPHM layer, Compacter, arXiv 2106.04647, section 3.2)."""

    def __init__(self, rule: nn.Parameter, wide_in: int, wide_out: int, rank: int) -> None:
        super().__init__()
        n = len(rule)
        self.rule = rule
        self.left = nn.Parameter(_glorot(n, wide_in // n, rank, like=rule))
        self.right = nn.Parameter(_glorot(n, rank, wide_out // n, like=rule))
        self.bias = nn.Parameter(rule.new_zeros(wide_out))

    def made(self) -> tuple[Tensor, Tensor]:
        return kronecker_sum(self.rule, self.left @ self.right), self.bias


def rule(n: int, device: torch.device) -> nn.Parameter:
    """The small matrices A, (n, n, n), so close to zero that a layer starts as the backbone's, to rounding."""
    return nn.Parameter(torch.empty(n, n, n, device=device).normal_(std=STD))


def share(model: nn.Module, parts: Sequence[SubLayer], method: str, reduction: int, n: int, rank: int) -> None:
    """Put a bottleneck of two low-rank layers after each of these sub-layers; all of them share the small matrices.

    Raises:
        UsageError: the reduction or n does not fit the model.
    """
    shared = rule(n, next(model.parameters()).device)
    for part in parts:
        wide = bottleneck.width(model, part)
        size = bottleneck.size(method, wide, reduction)
        check(method, n, wide, size, rank)
        down, up = LowRankHypercomplex(shared, wide, size, rank), LowRankHypercomplex(shared, size, wide, rank)
        bottleneck.after(model, part, bottleneck.Bottleneck(down, up, F.gelu))


def kronecker_sum(rule: Tensor, factor: Tensor) -> Tensor:
    """(Σᵢ Aᵢ ⊗ Bᵢ)ᵀ, (out, in), of A (n, n, n) and B (n, in / n, out / n)."""
    n, rows, columns = factor.shape
    return torch.einsum("ipq,ist->qtps", rule, factor).reshape(n * columns, n * rows)


def check(method: str, n: int, width: int, size: int, rank: int = 1) -> None:
    """Refuse an ``n`` that does not divide the hidden size and the bottleneck's, or a rank above what that leaves.

    Raises:
        UsageError: see above.
    """
    fitting = bottleneck.divisors(math.gcd(width, size))
    if n not in fitting:
        near = max(number for number in fitting if number <= n)
        raise UsageError(
            f"{method} cannot work with n = {n} on this model.",
            f"It must divide the hidden size, {width}, and the bottleneck, {size}: "
            f"be one of {', '.join(map(str, fitting))}.",
            f"Use --set options.n={near}, or another reduction.",
        )
    if rank > size // n:
        raise UsageError(
            f"{method} cannot work with rank = {rank} on this model.",
            f"Its large matrices are of rank {size // n} at most: the bottleneck, {size}, over n, {n}.",
            f"Use --set options.rank={size // n} or less.",
        )


def _glorot(n: int, rows: int, columns: int, *, like: Tensor) -> Tensor:
    """n matrices, each with the variance that keeps signals of one size (Glorot and Bengio, 2010)."""
    bound = math.sqrt(6 / (rows + columns))
    return torch.empty(n, rows, columns, device=like.device).uniform_(-bound, bound)
