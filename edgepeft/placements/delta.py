"""A trained change of a linear layer's weight: added to its output while training, folded into it afterwards."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

CHILD = "delta"


class Delta(nn.Module):
    """What a linear layer y = x Wᵀ gains: y + ``forward(x)``, where ``forward(x)`` is x ΔWᵀ."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of x."""

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW, (out, in), in fp32."""


def attach(linear: nn.Module, delta: Delta) -> None:
    """Hang ``delta`` on a linear layer, packed or plain, as its child ``delta``; the layer keeps name and weight."""
    linear.add_module(CHILD, delta)
    linear.register_forward_hook(_add)


def fold(model: nn.Module) -> None:
    """Add every delta to its layer's weight and remove it. The layers must be unpacked (``precision.unpack``)."""
    for module in list(model.modules()):
        delta = getattr(module, CHILD, None)
        if isinstance(module, nn.Linear) and isinstance(delta, Delta):
            with torch.no_grad():
                module.weight.add_(delta.weight().to(module.weight.device, module.weight.dtype))
            delattr(module, CHILD)
            for key in [key for key, hook in module._forward_hooks.items() if hook is _add]:
                del module._forward_hooks[key]


def _add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    # Looked up by name, so that a deep copy of the model uses its own copy of the delta.
    return output + getattr(module, CHILD)(inputs[0])
