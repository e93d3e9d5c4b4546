"""Fake tensors, faster: an operator that was seen before with inputs of the same shapes is not worked out again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

LARGEST = 100_000  # answers, of about a kilobyte each, after which all are forgotten

Signature = tuple[Hashable, ...]

_PLAIN = frozenset({type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format})
_NUMBERS = frozenset({int, float, bool})  # 1, 1.0 and True are equal, but make results of different types
_PLACED = frozenset({torch.ops.aten.as_strided.default, torch.ops.aten.view.dtype})  # count from where memory begins
_VARYING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})


class RecallingMode(FakeTensorMode):
    """PyTorch's fake tensors with a lookup in front, because working out shapes takes most of a trace's time.

    What an operator returns follows from the shapes, strides and types of its inputs, its ``Signature``. The few of
    which that is not true, and all that is not plain dense tensors, are left to PyTorch each time.

    """

    def __init__(self) -> None:
        super().__init__()
        self.cache_enabled = False  # PyTorch's own, which this one makes superfluous

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while tracing, and the guard against it costs more than the lookup

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        signature, tensors = describe(func, args, kwargs)
        if signature is not None and signature in _known:
            return self.recall(signature, tensors)
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if signature is not None and signature not in _never:
            changed = describe(func, args, kwargs)[0] != signature  # an input was given another shape in place
            answer = None if changed else self._learn(func, tensors, result)
            if len(_known) + len(_never) >= LARGEST:
                _known.clear()
                _never.clear()
            if answer is None:
                _never.add(signature)
            else:
                _known[signature] = answer
        return result

    def knows(self, signature: Signature | None) -> bool:
        """Whether ``recall`` can be asked."""
        return signature in _known

    def recall(self, signature: Signature, tensors: list[Any]) -> Any:
        """What the operator returns for ``tensors``."""
        return _known[signature].make(self, tensors)

    def _learn(self, func: Any, tensors: list[Any], result: Any) -> _Answer | None:
        """How to make such a result again; None where it takes more than shapes."""
        if not _VARYING.isdisjoint(func.tags):
            return None
        container = next((kind for kind in (list, tuple) if isinstance(result, kind)), None)
        parts = [_part(each, tensors) for each in (result if container else (result,))]
        if None in parts:
            return None
        answer = _Answer(tuple(part for part in parts if part is not None), container)
        return answer if _alike(result, answer.make(self, tensors)) else None


@dataclass(frozen=True)
class _Same:
    """The input at ``index``, which was written in place; where that is negative, ``value``, which is no tensor."""

    index: int
    value: int | None = None

    def make(self, mode: RecallingMode, tensors: list[Any]) -> Any:
        return tensors[self.index] if self.index >= 0 else self.value


@dataclass(frozen=True)
class _New:
    """A new tensor, in memory of its own or in that of the input at ``index``, ``offset`` elements behind that."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    attributes: Mapping[str, Any]

    def make(self, mode: RecallingMode, tensors: list[Any]) -> Any:
        with torch._C._DisableTorchDispatch():
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.index >= 0:
                base = tensors[self.index]
                offset = base.storage_offset() + self.offset
                made.set_(base.untyped_storage(), offset, self.shape, self.stride)
            fake: Any = Tensor._make_subclass(
                FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=self.device
            )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        fake.__dict__.update(self.attributes)
        fake.fake_mode = mode
        return fake


@dataclass(frozen=True)
class _Answer:
    parts: tuple[_Same | _New, ...]
    container: type | None  # list or tuple, where the operator returns one

    def make(self, mode: RecallingMode, tensors: list[Any]) -> Any:
        if self.container is None:
            return self.parts[0].make(mode, tensors)
        return self.container(part.make(mode, tensors) for part in self.parts)


_known: dict[Signature | None, _Answer] = {}
_never: set[Signature] = set()


def describe(func: Any, args: Any, kwargs: Any) -> tuple[Signature | None, list[Any]]:
    """All that an operator's result depends on but for values, and the tensors among its inputs.

    The first is None where values matter, or may.
    """
    tensors: list[Any] = []
    found: list[Any] = [func, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    whole = _describe(args, found, tensors)
    if kwargs and whole:
        found.extend(kwargs)
        whole = _describe(kwargs.values(), found, tensors)
    if func in _PLACED:
        found.extend(tensor.storage_offset() for tensor in tensors)
    return (tuple(found) if whole else None), tensors


def _describe(values: Iterable[Any], found: list[Any], tensors: list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.layout is not torch.strided:  # PyTorch knows its value
                return False
            tensors.append(value)
            stride = value.stride()
            found += (value.shape, stride, value.dtype, value._fake_device, value.requires_grad)
            if 0 in stride:  # expanded: what it takes cannot be told from its shape
                found.append(value.untyped_storage().nbytes())
        elif kind in _NUMBERS:
            found += (kind, value)
        elif kind in _PLAIN:
            found.append(value)
        elif kind is list or kind is tuple:
            found += (kind, len(value))
            if not _describe(value, found, tensors):
                return False
        else:
            return False
    return True


def _part(value: Any, tensors: list[Any]) -> _Same | _New | None:
    if value is None or type(value) in (int, bool):
        return _Same(-1, value)
    for index, tensor in enumerate(tensors):
        if tensor is value:
            return _Same(index)
    if type(value) is not FakeTensor or value.constant is not None or value.requires_grad:
        return None
    if value.layout is not torch.strided or value.dtype.is_complex:
        return None
    memory = _memory(value)
    index = next((i for i, tensor in enumerate(tensors) if _memory(tensor) == memory), -1)
    attributes = {name: held for name, held in value.__dict__.items() if name != "fake_mode"}
    offset = int(value.storage_offset()) - (int(tensors[index].storage_offset()) if index >= 0 else 0)
    shape, stride = tuple(value.shape), value.stride()
    return _New(index, shape, stride, offset, value.dtype, value._fake_device, attributes)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _alike(one: Any, other: Any) -> bool:
    """Whether two results of an operator cannot be told apart."""
    return all(map(_same, one, other)) if isinstance(one, (list, tuple)) else _same(one, other)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    return (
        (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())
        and one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        and torch._C._dispatch_key_set(one) == torch._C._dispatch_key_set(other)
    )
