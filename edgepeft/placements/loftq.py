"""LoftQ: packed weights and a low-rank change that together are closest to the weights before packing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgepeft import precision
from edgepeft.precision import StoredLinear


def alternate(linear: nn.Linear, at: str, rank: int, times: int) -> tuple[StoredLinear, Tensor, Tensor]:
    """Pack W - B A, then fit B A to what packing lost, ``times`` times (arXiv 2310.08659, algorithm 1).

    The fit is a full singular value decomposition, so that the same weights always give the same result.

    Returns:
        The packed layer Q, A (rank, in) and B (out, rank), both fp32, with W ≈ Q + B A.
    """
    weight = linear.weight.detach().float()
    low = torch.zeros_like(weight)
    for _ in range(times):
        with torch.device("meta"):
            rest = nn.Linear(linear.in_features, linear.out_features, bias=False)
        rest.weight = nn.Parameter(weight - low, requires_grad=False)
        rest.bias = linear.bias
        packed = precision.pack(rest, at)
        left, values, right = torch.linalg.svd(weight - packed.dequantize(torch.float32), full_matrices=False)
        root = values[:rank].sqrt()
        a, b = root[:, None] * right[:rank], left[:, :rank] * root
        low = b @ a
    return packed, a, b
