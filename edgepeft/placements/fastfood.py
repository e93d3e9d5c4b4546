"""Few numbers become many by a random linear map that costs O(many · log few) and is kept nowhere.

Fastfood (Le, Sarlós and Smola, arXiv 1408.3060): blocks H G Π H B of the size of the few, with Hadamard matrices H,
random signs B, a permutation Π and random normal numbers G. Signs and normal numbers are hashes of where they stand,
computed when needed and alike on every device; one permutation serves all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RADIX = 32  # of the transform
CHUNK = 2**20  # numbers that are worked on at a time: the rest of a layer needs no temporaries
MOST_CHUNKS = 4  # of the largest layers: planning has to follow every one, and its temporaries are about the layer's
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
    def scale(self) -> float:
        return 1 / math.sqrt(self.size * self.many)

    def project(self, vector: Tensor) -> Tensor:
        """P v: (few,) to (many,), in fp32."""
        order, factors = self._order(vector.device), factors_of(self.size, vector.device)
        padded = torch.nn.functional.pad(vector.float(), (0, self.size - self.few))
        result = padded.new_empty(self.many)
        for first, part in self._parts(result):
            signs, normal = self._random(first, -(-len(part) // self.size), vector.device)
            rows = hadamard(padded * signs, factors).index_select(1, order).mul_(normal)
            part.copy_(hadamard(rows, factors).flatten()[: len(part)])
        return result.mul_(self.scale)

    def transposed(self, values: Tensor) -> Tensor:
        """Pᵀ u: (many,) to (few,), in fp32."""
        order, factors = self._order(values.device), factors_of(self.size, values.device)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(self.size, device=order.device))
        result = values.new_zeros(self.size, dtype=torch.float32)
        for first, part in self._parts(values):
            blocks = -(-len(part) // self.size)
            signs, normal = self._random(first, blocks, values.device)
            rows = torch.nn.functional.pad(part.float(), (0, blocks * self.size - len(part))).view(blocks, self.size)
            mixed = hadamard(rows, factors).mul_(normal).index_select(1, back)
            result += hadamard(mixed, factors).mul_(signs).sum(0)
        return result[: self.few] * self.scale

    def _parts(self, numbers: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Slices of (many,) that hold whole blocks, but for the last one's end, each with where it begins."""
        length = self.size * max(1, max(CHUNK, self.many // MOST_CHUNKS) // self.size)
        for first in range(0, self.many, length):
            yield first, numbers[first : first + length]

    def _random(self, first: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Signs and normal numbers, (blocks, size), of the blocks from number ``first`` of the many on."""
        bits = _hash(first, blocks * self.size, self.seed, device).view(blocks, self.size)
        signs = (bits & 1).mul_(2).sub_(1)
        uniform = (bits >> 8).float().add_(0.5).mul_(2**-23)  # inside (-1, 1), of other bits than the signs
        return signs, torch.erfinv(uniform).mul_(math.sqrt(2))

    def _order(self, device: torch.device) -> Tensor:
        """The permutation, (size,)."""
        return (_hash(0, self.size, self.seed ^ 0x5BD1E995, device).long() & _MASK).argsort(stable=True)


def hadamard(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x H along the last dimension, whose size is a power of two: a fast Walsh-Hadamard transform.

    H is the Kronecker product of ``factors_of(size)``, which are multiplied with one after the other: in each of
    log(size) / log(``RADIX``) rounds a number takes part in ``RADIX`` products, more than the two sums of five rounds
    of the usual butterfly, but where a matrix product is at home. It is about twenty times as fast.
    """
    shape, inner = x.shape, 1
    for factor in factors:
        radix = len(factor)
        if inner == 1:
            x = x.reshape(-1, radix) @ factor
        else:
            x = x.reshape(-1, radix, inner)
            x = torch.bmm(factor.expand(len(x), radix, radix), x)
        inner *= radix
    return x.reshape(shape)


def factors_of(size: int, device: torch.device) -> list[Tensor]:
    """The Hadamard matrices, of ``RADIX`` and a rest, whose Kronecker product is that of ``size``; in fp32."""
    found, inner = [], 1
    while inner < size:
        matrix = torch.ones(1, 1, device=device)
        while len(matrix) < min(RADIX, size // inner):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        found.append(matrix)
        inner *= len(matrix)
    return found


def _hash(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """32 random bits for each of ``count`` whole numbers from ``first`` on, int32: Mueller's multiply-and-shift hash.

    Products wrap around, as those of unsigned numbers do; a shift to the right must be kept from carrying the sign.
    """
    start = first + seed * 0x9E3779B1 & _MASK
    bits = torch.arange(count, dtype=torch.int32, device=device).add_(start - (start >> 31 << 32))
    for _ in range(2):
        bits = ((bits >> 16) & 0xFFFF).bitwise_xor_(bits).mul_(0x45D9F3B)
    return ((bits >> 16) & 0xFFFF).bitwise_xor_(bits)
