"""What PEFT's layers would find in tensors, presumed while they are planned: fake tensors hold nothing to look at.

Where PEFT asks a tensor for a number or for a mask's true elements, the answer is the one that ordinary values give.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgepeft.precision import is_shape_only

_DRAWS = ("LOHA", "LOKR")  # ask whether a random number is above the share of layers that are dropped


class _Presuming(TorchDispatchMode):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.kind = config, config.peft_type.value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func is aten.nonzero.default:
            return args[0].new_empty(self._true(args[0]), args[0].dim(), dtype=torch.long)
        if func is aten.index.Tensor and any(each is not None and each.dtype is torch.bool for each in args[1]):
            found = [each if each is None or each.dtype is not torch.bool else self._places(each) for each in args[1]]
            return args[0][tuple(slice(None) if each is None else each for each in found)]
        if func is aten.bincount.default:
            return args[0].new_empty((kwargs or {}).get("minlength", args[2] if len(args) > 2 else 0))
        return func(*args, **(kwargs or {}))

    def _number(self, tensor: Tensor) -> Any:
        return {torch.bool: bool, torch.float32: float}.get(tensor.dtype, int)(self.kind in _DRAWS)

    def _true(self, mask: Tensor) -> int:
        """How many elements of a mask are true: SHiRA's rank times height and width, all of the others'."""
        return self.config.r * sum(mask.shape) if self.kind == "SHIRA" else mask.numel()

    def _places(self, mask: Tensor) -> Tensor:
        return mask.new_empty(self._true(mask), dtype=torch.long)


@contextlib.contextmanager
def values(model: nn.Module, config: Any) -> Iterator[None]:
    """Presume what tensors hold, if those of ``model`` hold nothing."""
    if not is_shape_only(next(model.parameters())):
        yield
        return
    fake: Any = FakeTensor
    fake.__deepcopy__ = _copied
    try:
        with _Presuming(config):
            yield
    finally:
        del fake.__deepcopy__


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A deep copy of a fake tensor; torch's would copy the mode it belongs to as well, or look for its data."""
    made = tensor.detach().clone()
    kept = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    memo[id(tensor)] = kept
    return kept


def follow(model: nn.Module, config: Any) -> None:
    """Presume it too whenever one of the layers that PEFT made is called, in backward again where checkpointed."""
    from peft.tuners.tuners_utils import BasePromptEncoder, BaseTunerLayer

    if not is_shape_only(next(model.parameters())):
        return
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, BasePromptEncoder)):
            vars(module)["forward"] = _wrapped(module, config)


def _wrapped(module: Any, config: Any) -> Any:
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Presuming(config):
            return own(*args, **kwargs)

    return forward
