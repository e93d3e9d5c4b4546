"""A small network that adds to a layer's residual stream: after a sub-layer, beside it, or after the sum behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Block, SubLayer
from edgepeft.errors import UsageError
from edgepeft.placements.projection import Projection, near_zero

CHILD, TAP = "bottleneck", "tap"

# Why what is placed here cannot be merged: a method's obstacle.
OBSTACLE = "An adapter bends what it reads (a nonlinearity), which no weight of the backbone can stand for."

Activation = Callable[[Tensor], Tensor]


class Bottleneck(nn.Module):
    """x → scale · up(activation(down(x))), (..., hidden) to (..., hidden)."""

    def __init__(self, down: nn.Module, up: nn.Module, activation: Activation, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up, self.activation, self.scale = down, up, activation, scale

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.activation(self.down(x)))
        return added if self.scale == 1.0 else added * self.scale


def dense(width: int, size: int, activation: Activation, device: torch.device) -> Bottleneck:
    """A bottleneck of two full projections that starts near zero, and so its layer near the backbone's."""
    down = Projection(near_zero(size, width, device=device), torch.zeros(size, device=device))
    up = Projection(near_zero(width, size, device=device), torch.zeros(width, device=device))
    return Bottleneck(down, up, activation)


def dense_from_zero(
    width: int, size: int, activation: Activation, device: torch.device, scale: float = 1.0
) -> Bottleneck:
    """A bottleneck that starts exactly at zero, as LoRA does: the first projection random, the second zero."""
    down = Projection(torch.empty(size, width, device=device), torch.zeros(size, device=device))
    up = Projection(torch.zeros(width, size, device=device), torch.zeros(width, device=device))
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    return Bottleneck(down, up, activation, scale)


def width(model: nn.Module, part: SubLayer) -> int:
    """The hidden size, which is that of the sub-layer's input and output."""
    reader: Any = model.get_submodule(part.reader)
    found: int = reader.in_features
    return found


def size(method: str, width: int, reduction: int) -> int:
    """The bottleneck's width, ``width / reduction``.

    Raises:
        UsageError: that is not a whole number.
    """
    if width % reduction:
        fitting = divisors(width)
        near = max(number for number in fitting if number <= reduction)
        raise UsageError(
            f"{method} cannot work with reduction = {reduction} on this model.",
            f"It must divide the hidden size, {width}: be one of {', '.join(map(str, fitting))}.",
            f"Use --set options.reduction={near}.",
        )
    return width // reduction


def divisors(number: int) -> list[int]:
    """The whole numbers that divide another, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]


def after(model: nn.Module, part: SubLayer, module: nn.Module) -> None:
    """h → h + module(h), where h (..., hidden) is what a sub-layer is about to add to the residual stream."""
    output = model.get_submodule(part.output)
    output.add_module(CHILD, module)
    output.register_forward_hook(_add_after)


def beside(model: nn.Module, part: SubLayer, module: nn.Module) -> None:
    """h → h + module(x), where x (..., hidden) is what the sub-layer reads."""
    channel = _Channel()
    reader, output = model.get_submodule(part.reader), model.get_submodule(part.output)
    reader.add_module(TAP, _Tap(channel))
    reader.register_forward_pre_hook(_tap)
    output.add_module(CHILD, _Beside(module, channel))
    output.register_forward_hook(_add_beside)


def after_layer(model: nn.Module, block: Block, module: nn.Module) -> None:
    """y → y + module(y), where y (..., hidden) is a layer's output.

    Where a norm ends the layer (BERT), the module reads the norm's output and adds to its input: norm(s + module(y))
    with y = norm(s).
    """
    last = list(block.sub_layers.values())[-1]
    owner = model.get_submodule(last.norm or block.path)
    owner.add_module(CHILD, module)
    owner.register_forward_hook(_add_before_norm if last.norm else _add_to_layer)


class _Channel:
    """Carries what a sub-layer reads to the end of the sub-layer, during one forward pass."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Channel:
        return memo.setdefault(id(self), _Channel())


class _Tap(nn.Module):
    """A module, as children are what stays with a layer that is replaced by a packed one."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self.channel = channel


class _Beside(nn.Module):
    def __init__(self, module: nn.Module, channel: _Channel) -> None:
        super().__init__()
        self.module, self.channel = module, channel


def _tap(reader: nn.Module, inputs: tuple[Any, ...]) -> None:
    tap: Any = getattr(reader, TAP)
    tap.channel.value = inputs[0]


# The modules are looked up by name, so that a deep copy of the model uses its own.
def _add_after(output: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
    return hidden + getattr(output, CHILD)(hidden)


def _add_beside(output: nn.Module, inputs: tuple[Any, ...], hidden: Tensor) -> Tensor:
    side: Any = getattr(output, CHILD)
    read, side.channel.value = side.channel.value, None
    return hidden + side.module(read)


def _add_to_layer(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    hidden = output if isinstance(output, Tensor) else output[0]
    hidden = hidden + getattr(layer, CHILD)(hidden)
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _add_before_norm(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return norm.forward(inputs[0] + getattr(norm, CHILD)(output))
