"""A dense change behind hard-concrete gates, which can be exactly shut (arXiv 1712.01312)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.placements.change import Change

SMALLEST = 1e-6  # of uniform random numbers, so that their logits are finite


class Gated(Change):
    """W + z ∘ Δ, z = min(1, max(0, (2 s − 1) · stretch)), s = sigmoid(logit(u) + gate), u uniform in each training
    pass.

    The gates lie between −stretch and stretch before they are cut off. In evaluation s = sigmoid(gate). Both trained
    tensors, of the shape of W, are fp32; Δ starts at zero.

    Args:
        start: where the gates' parameters start.
    """

    draws = True

    def __init__(self, frozen: Tensor, *, start: float, stretch: float) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(frozen, dtype=torch.float32))
        self.gate = nn.Parameter(torch.full_like(frozen, start, dtype=torch.float32))
        self.stretch = stretch

    def trained(self) -> tuple[Tensor, ...]:
        return self.delta, self.gate

    def made(self, frozen: Tensor, *trained: Tensor) -> Tensor:
        delta, gate = trained
        if self.training:
            gate = gate + torch.logit(torch.rand_like(gate), SMALLEST)
        return frozen + delta * self._opened(gate)

    def settled(self) -> Tensor:
        """z ∘ Δ in evaluation."""
        return self.delta.detach() * self._opened(self.gate.detach())

    def _opened(self, gate: Tensor) -> Tensor:
        return torch.clamp((2 * torch.sigmoid(gate) - 1) * self.stretch, 0, 1)


def expected_open(gate: Tensor) -> Tensor:
    """How many gates are expected not to be shut, a scalar: the sum of P(z > 0) = sigmoid(gate)."""
    opened: Tensor = _ExpectedOpen.apply(gate)
    return opened


class _ExpectedOpen(torch.autograd.Function):
    """The sum of sigmoid(gate), of which only the gates themselves are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return torch.sigmoid(gate).sum()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (gate,) = ctx.saved_tensors
        opened = torch.sigmoid(gate)
        return opened.mul_(1 - opened).mul_(grad[0])
