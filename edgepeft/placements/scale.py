"""A trained factor for each feature that a linear layer reads or gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "input_scale", "output_scale"


class Scale(nn.Module):
    """x · factors, over the last ``count`` features of x; the factors start at 1 and are fp32."""

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(count, device=device))

    def padded(self, width: int) -> Tensor:
        """A factor for every one of ``width`` features."""
        rest = width - len(self.factors)
        return torch.cat([self.factors.new_ones(rest), self.factors]) if rest else self.factors

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.padded(x.shape[-1])).to(x.dtype)  # rounded to bf16, a factor would be 1 up to 1.004


def outputs(linear: nn.Module, scale: Scale) -> None:
    """Scale what a linear layer gives, its bias included."""
    linear.add_module(OUTPUT, scale)
    linear.register_forward_hook(_scale_output)


def inputs(linear: nn.Module, scale: Scale) -> None:
    """Scale what a linear layer reads."""
    linear.add_module(INPUT, scale)
    linear.register_forward_pre_hook(_scale_input)


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write every scale into its layer's weight, rows or columns. The layers must be unpacked."""
    for module in list(model.modules()):
        scales = {name: child for name, child in module.named_children() if isinstance(child, Scale)}
        if not isinstance(module, nn.Linear) or not scales:
            continue
        if INPUT in scales:
            module.weight.mul_(scales[INPUT].padded(module.in_features))
        if OUTPUT in scales:
            factors = scales[OUTPUT].padded(module.out_features)
            module.weight.mul_(factors[:, None])
            if module.bias is not None:
                module.bias.mul_(factors)
        for name in scales:
            delattr(module, name)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_scale_input, _scale_output)]:
                del hooks[key]


# Looked up by name, so that a deep copy of the model uses its own.
def _scale_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    scaled: Tensor = getattr(module, OUTPUT)(output)
    return scaled


def _scale_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, INPUT)(args[0]), *args[1:])
