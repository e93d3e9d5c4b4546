"""A trained change of a linear layer: made to its output while training, folded into its weight afterwards."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.precision import StoredLinear

CHILD = "delta"


class Delta(nn.Module):
    """A change of a linear layer y = x Wᵀ + b that can be folded into W and b."""

    @abstractmethod
    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        """The layer's new output, (..., out), in the dtype of ``output``.

        Args:
            x: what the layer reads, (..., in).
            output: what it made of that; where half precision is multiplied in fp32, not rounded yet.
            linear: the layer, plain or packed; ``precision.weight_of`` gives its weight.
        """

    @abstractmethod
    def fold(self, linear: nn.Linear) -> None:
        """Write the change into the layer's weight and bias. Called without gradients."""


class Additive(Delta):
    """What is added to a linear layer: y + x ΔWᵀ."""

    @abstractmethod
    def change(self, x: Tensor) -> Tensor:
        """x ΔWᵀ, (..., in) to (..., out), in the dtype of x or in fp32."""

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW, (out, in), in fp32."""

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        return output + self.change(x)

    def fold(self, linear: nn.Linear) -> None:
        linear.weight.add_(self.weight().to(linear.weight.device, linear.weight.dtype))


def attach(linear: nn.Module, delta: Delta) -> None:
    """Hang ``delta`` on a linear layer, packed or plain, as its child ``delta``; the layer keeps name and weight.

    A layer may have several, applied and folded in turn (``delta``, ``delta1``); those after the first are additive.
    """
    before = len(_of(linear))
    assert not before or isinstance(delta, Additive), "a change that reads the weight must read the layer's own"
    linear.add_module(f"{CHILD}{before or ''}", delta)
    if not before:
        linear.register_forward_pre_hook(_unrounded, with_kwargs=True)
        linear.register_forward_hook(_change)


def fold(model: nn.Module) -> None:
    """Write every delta into its layer and remove it. The layers must be unpacked (``precision.unpack``)."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            for name, delta in _of(module).items():
                with torch.no_grad():
                    delta.fold(module)
                delattr(module, name)
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_change, _unrounded)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _of(module: nn.Module) -> dict[str, Delta]:
    return {name: child for name, child in module.named_children() if isinstance(child, Delta)}


def _unrounded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Rounded to half precision before it is added to, an output loses every change below 1/256 of it.
    return (args, {**kwargs, "rounded": False}) if isinstance(module, StoredLinear) else None


def _change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    # Looked up by name, so that a deep copy of the model uses its own copies of the deltas.
    for delta in _of(module).values():
        output = delta(args[0], output, module)
    return output.to(args[0].dtype)
