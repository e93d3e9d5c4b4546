"""Work at the end of a frozen stack, on what its layers computed; nothing is sent back through them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from edgepeft.anatomy import Stack, is_norm

WATCH, END = "watch", "late"


class Late(nn.Module):
    """Changes the states that leave a stack, before its final norm if it has one."""

    @abstractmethod
    def forward(self, hidden: Tensor, read: Sequence[Tensor]) -> Tensor:
        """(batch, tokens, hidden) to the same, from them and what was read in the stack, without a graph."""


def attach(model: Any, stack: Stack, late: Late, read: Sequence[str], what: Literal["input", "output"]) -> None:
    """Let ``late`` change what leaves ``stack``, given the inputs or the outputs of the modules named in ``read``."""
    channel = _Channel()
    for name in read:
        module = model.get_submodule(name)
        module.add_module(WATCH, _Watch(channel))
        if what == "input":
            module.register_forward_pre_hook(_note_input)
        else:
            module.register_forward_hook(_note_output)
    owner = model.get_submodule(stack.owner)
    norms = [child for child in owner.children() if is_norm(child)]
    # A model that calls its layers itself may pool their states, or normalise them without a weight.
    end = norms[-1] if norms else model.get_submodule(stack.layers)[-1] if owner is model.base_model else owner
    end.add_module(END, _End(late, channel))
    if norms:
        end.register_forward_pre_hook(_change_input)
    else:
        end.register_forward_hook(_change_output)


class _Channel:
    """What was read so far in one forward pass, in the order of the stack."""

    def __init__(self) -> None:
        self.read: list[Tensor] = []

    def taken(self) -> list[Tensor]:
        read, self.read = self.read, []
        return read

    def __deepcopy__(self, memo: dict[int, Any]) -> _Channel:
        return memo.setdefault(id(self), _Channel())


class _Watch(nn.Module):
    """A module, as children are what stays with a layer that is replaced by a packed one."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self.channel = channel


class _End(nn.Module):
    def __init__(self, late: Late, channel: _Channel) -> None:
        super().__init__()
        self.late, self.channel = late, channel

    def forward(self, hidden: Tensor) -> Tensor:
        changed: Tensor = self.late(hidden, self.channel.taken())
        return changed


def _note_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    watch: Any = getattr(module, WATCH)
    watch.channel.read.append(inputs[0].detach())


def _note_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    watch: Any = getattr(module, WATCH)
    watch.channel.read.append((output if isinstance(output, Tensor) else output[0]).detach())


def _change_input(norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return getattr(norm, END)(inputs[0].detach()), *inputs[1:]


def _change_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Of a stack, or of its last layer."""
    if isinstance(output, Tensor):
        return getattr(module, END)(output.detach())
    if isinstance(output, (tuple, list)):
        return getattr(module, END)(output[0].detach()), *output[1:]
    output.last_hidden_state = getattr(module, END)(output.last_hidden_state.detach())
    return output
