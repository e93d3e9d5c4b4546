"""Few numbers become many by a random linear map that costs O(many · log few) and is kept nowhere.

Fastfood (Le, Sarlós and Smola, arXiv 1408.3060): blocks H G Π H B of the size of the few, with Hadamard matrices H,
random signs B, a permutation Π and random normal numbers G. Signs and normal numbers are hashes of where they stand,
computed when needed and alike on every device; one permutation serves all blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Fastfood:
    """A map P from ``few`` numbers to ``many`` with E ‖P v‖² = ‖v‖²; each ``seed`` gives another."""

    few: int
    many: int
    seed: int

    @property
    def size(self) -> int:
        """Of a block: the power of two that ``few`` fits into."""
        return 1 << max(0, self.few - 1).bit_length()

    @property
    def blocks(self) -> int:
        return -(-self.many // self.size)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.size * self.many)

    def project(self, vector: Tensor) -> Tensor:
        """P v: (few,) to (many,), in fp32."""
        signs, normal, order = self._random(vector.device)
        rows = torch.nn.functional.pad(vector.float(), (0, self.size - self.few)) * signs
        rows = hadamard(hadamard(rows)[:, order] * normal)
        return rows.flatten()[: self.many] * self.scale

    def transposed(self, values: Tensor) -> Tensor:
        """Pᵀ u: (many,) to (few,), in fp32."""
        signs, normal, order = self._random(values.device)
        rows = torch.nn.functional.pad(values.float(), (0, self.blocks * self.size - self.many))
        rows = hadamard(rows.view(self.blocks, self.size)) * normal
        rows = hadamard(torch.empty_like(rows).index_copy_(1, order, rows)) * signs
        return rows.sum(0)[: self.few] * self.scale

    def _random(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Signs and normal numbers, (blocks, size), and the permutation, (size,)."""
        bits = _hash(torch.arange(self.blocks * self.size, device=device), self.seed)
        signs = (bits & 1) * 2.0 - 1.0
        uniform = ((bits >> 1) + 0.5) / 2**30 - 1.0  # inside (-1, 1)
        normal = torch.erfinv(uniform.clamp(-1 + 2**-24, 1 - 2**-24)) * math.sqrt(2)
        order = _hash(torch.arange(self.size, device=device), self.seed ^ 0x5BD1E995).argsort(stable=True)
        shape = (self.blocks, self.size)
        return signs.view(shape), normal.view(shape), order


def hadamard(x: Tensor) -> Tensor:
    """x H along the last dimension, whose size is a power of two, by the fast Walsh-Hadamard transform."""
    step = 1
    while step < x.shape[-1]:
        one, other = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((one + other, one - other), dim=-2).flatten(-3)
        step *= 2
    return x


def _hash(index: Tensor, seed: int) -> Tensor:
    """32 random bits for each whole number below 2³²: Mueller's multiply-and-shift hash."""
    bits = (index + seed * 0x9E3779B1) & _MASK
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B & _MASK
    return (bits >> 16) ^ bits
