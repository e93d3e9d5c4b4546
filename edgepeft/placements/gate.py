"""A trained number between 0 and 1 for every token, read off the token itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import precision

STD = 0.02  # of weights at first


class Gate(nn.Module):
    """sigmoid(x Wᵀ + b), with W (outputs, in) and b in fp32; near 1/2 at first."""

    def __init__(self, wide_in: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, wide_in, device=device) * STD)
        self.bias = nn.Parameter(torch.zeros(outputs, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., outputs), in the dtype of x."""
        return self.log(x).exp().to(x.dtype)

    def log(self, x: Tensor) -> Tensor:
        """The log of the gate, in fp32: where it closes, the gate itself would round to 0."""
        return F.logsigmoid(precision.linear(x, self.weight).float() + self.bias)
