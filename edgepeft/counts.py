"""What fine-tuning changed, in numbers that guideline 1 of the survey asks for (arXiv 2303.15647, section 12)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.ledger import RANKS

ROWS = 1024  # of a matrix that are looked at at once


@dataclass(frozen=True)
class Change:
    """How a merged model differs from its backbone.

    Attributes:
        parameters: whose values differ.
        rank: the largest rank of any matrix's change, at most ``ledger.RANKS``; 0 when no matrix changed.
    """

    parameters: int
    rank: int


def training(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What training took, of ``ledger.Row.stages``: the last stage's parameters, which an adapter holds, and the most
    that an earlier one trained, where that is more; the largest peak, and the speed of all.
    """
    last, most = stages[-1]["trained"], max(stage["trained"] for stage in stages)
    return {
        "trained_parameters": last,
        **({"trained_parameters_at_most": most} if most > last else {}),
        "training_peak_bytes": max(stage["peak_bytes"] for stage in stages),
        "training_tokens_per_second": speed(stages),
    }


def speed(stages: Sequence[Mapping[str, Any]]) -> float:
    """Tokens a second of training, without the updates that were slowed by watching their memory if there are others.

    Args:
        stages: with ``tokens`` and ``seconds`` of all updates, and ``timed_tokens`` and ``timed_seconds`` of those.
    """
    for of in ("timed_", ""):
        if tokens := sum(stage[f"{of}tokens"] for stage in stages):
            return float(tokens / max(sum(stage[f"{of}seconds"] for stage in stages), 1e-9))
    return 0.0


@torch.no_grad()
def beside(before: nn.Module, adapter: Mapping[str, Tensor]) -> int:
    """Numbers in an adapter that its backbone, in fp32, does not have or has otherwise: what is changed unmerged.

    Where the numbers of a sparse adapter stand, which are whole numbers, is none of them.
    """
    own = dict(before.named_parameters())
    return sum(
        int((tensor.to(own[name]) != own[name]).sum()) if name in own else tensor.numel()
        for name, tensor in adapter.items()
        if tensor.is_floating_point()
    )


@torch.no_grad()
def change(parameters_before_and_after: Iterable[tuple[Tensor, Tensor]]) -> Change:
    """The difference of two models, from their parameters pair by pair, in fp32."""
    parameters = rank = 0
    for old, new in parameters_before_and_after:
        new = new.to(old.device)
        differing = sum(int((after != before).sum()) for before, after in _blocks(old, new))
        parameters += differing
        if differing and old.dim() == 2:
            rank = max(rank, rank_of_change(old, new))
    return Change(parameters, rank)


def rank_of_change(old: Tensor, new: Tensor) -> int:
    """The rank of new - old, (m, n), up to ``ledger.RANKS``, from its product with as many random vectors.

    W + Δ was rounded to fp32, and what rounding adds has full rank: singular values no larger than those of random
    errors of half a unit in the last place of the largest number (Marchenko and Pastur) do not count. Rows are taken a
    block at a time, so that an embedding does not need a copy of itself in fp64: all that is kept of the product is
    its triangular factor, which has the same singular values.
    """
    rows, columns = new.shape
    vectors = min(rows, columns, RANKS)
    generator = torch.Generator(new.device).manual_seed(0)
    sketch = torch.randn(columns, vectors, generator=generator, device=new.device, dtype=torch.float64)
    triangle = sketch.new_zeros(0, vectors)
    for before, after in _blocks(old, new):
        product = (after - before).double() @ sketch
        triangle = torch.linalg.qr(torch.cat([triangle, product]), mode="r").R
    values = torch.linalg.svdvals(triangle)
    error = torch.finfo(torch.float32).eps / 2 * float(new.abs().max())
    rounding = error * (math.sqrt(rows) + math.sqrt(columns)) * (math.sqrt(columns) + math.sqrt(vectors))
    return int((values > rounding).sum())


def _blocks(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(old.split(ROWS), new.split(ROWS), strict=True)
