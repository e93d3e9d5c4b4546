"""Answers that fake tensors cannot give: what peft's methods ask of values when they are set up or run.

Each keeps every shape as it is with real values, so that the same bytes are allocated.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def given() -> Iterator[None]:
    """While active, random choices are taken, nothing is infinite, and every element of a boolean mask is true."""
    selected = [0]  # how many elements SHiRA's mask has; it is r (in + out)
    rand, where, get, put = torch.rand, torch.where, Tensor.__getitem__, Tensor.__setitem__
    shira = importlib.import_module("peft.tuners.shira.layer").ShiraLayer
    shira_linear = importlib.import_module("peft.tuners.shira.layer").Linear
    boft = importlib.import_module("peft.tuners.boft.layer").BOFTLayer
    frod = importlib.import_module("peft.tuners.frod.layer").Linear
    update = shira.update_layer

    def counted(layer: Any, adapter: str, mask: Any, r: int, *args: Any, **kwargs: Any) -> Any:
        selected[0] = r * (layer.in_features + layer.out_features)
        return update(layer, adapter, mask, r, *args, **kwargs)

    def whole(tensor: Tensor, index: Any) -> Tensor:
        if _is_mask(index):
            return tensor.flatten(0, index.dim() - 1).clone()
        if isinstance(index, tuple) and len(index) == 2 and _is_mask(index[1]):
            return tensor.clone()
        return get(tensor, index)

    def filled(tensor: Tensor, index: Any, value: Any) -> None:
        if _is_mask(index):
            tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)
        else:
            put(tensor, index, value)

    def projections(layer: Any, adapter: str, *, device: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        outer, inner = (held[adapter].to(dtype=dtype) for held in (layer.frod_U, layer.frod_V))
        values, diagonal = (held[adapter].to(dtype) for held in (layer.frod_lambda_s_values, layer.frod_lambda_l))
        rows, columns = layer.frod_s_indices[adapter].to(dtype=torch.long)
        return outer, inner, _Sparse(rows, columns, values, len(inner)), diagonal

    def offloaded(layer: Any) -> None:
        """To a trace everything is on the device; what moves to the CPU leaves it."""
        weight = layer.get_base_layer().weight
        weight.data = torch.empty(0, dtype=weight.dtype)

    def sparse_change(layer: Any, adapter: str) -> _Sparse:
        rows, columns = layer.shira_indices[adapter]
        return _Sparse(rows, columns, layer.shira_weight[adapter] * layer.scaling[adapter], layer.out_features)

    with (
        mock.patch.object(torch, "rand", lambda *size, **kw: 1.0 if size == (1,) else rand(*size, **kw)),
        mock.patch.object(Tensor, "__bool__", lambda _: False),
        mock.patch.object(Tensor, "__getitem__", whole),
        mock.patch.object(Tensor, "__setitem__", filled),
        mock.patch.object(torch, "bincount", lambda x, minlength=0: torch.zeros(minlength, dtype=torch.long)),
        mock.patch.object(torch, "where", lambda *a, **kw: where(*a, **kw) if len(a) > 1 else _indices(selected[0])),
        mock.patch.object(shira, "update_layer", counted),
        mock.patch.object(boft, "perm2mat", lambda _, permutation: torch.zeros(len(permutation), len(permutation))),
        mock.patch.object(frod, "_get_frod_tensors", projections),
        mock.patch.object(frod, "_offload_base_weight_to_cpu", offloaded),
        mock.patch.object(shira_linear, "get_delta_weight", sparse_change),
        _clusters(),
    ):
        yield


@dataclass(frozen=True)
class _OnHost:
    """A buffer in the CPU's memory, of which the device gets a copy whenever it is used."""

    shape: torch.Size

    def to(self, like: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype if like is None else like.dtype)


def leave_on_host(model: Any) -> None:
    """Take off the device what peft makes on the CPU and does not move: BOFT's permutations and FRoD's projections."""
    from peft.tuners._buffer_dict import BufferDict

    owned = set()
    for module in model.modules():
        if "boft_P" in module._buffers:
            module.__dict__["boft_P"] = _OnHost(module._buffers.pop("boft_P").shape)
        for name in ("frod_U", "frod_V", "frod_s_indices"):
            held = getattr(module, name, None)
            if isinstance(held, BufferDict):
                module._modules.pop(name, None)
                module.__dict__[name] = {adapter: _OnHost(buffer.shape) for adapter, buffer in held.items()}
                owned.add(held)
    for held in owned:  # several layers share one
        held._buffers.clear()


@contextlib.contextmanager
def generating(tokens: int) -> Iterator[None]:
    """While active, ``generate`` makes so many new tokens: no answer ends before, no prompt is padded on the right."""
    from transformers.generation.utils import GenerationMixin

    left, item = iter(range(tokens)), Tensor.item
    unfinished = mock.patch.object(
        GenerationMixin, "_has_unfinished_sequences", lambda *_, **__: next(left, None) is not None
    )
    bools = mock.patch.object(Tensor, "item", lambda tensor: False if tensor.dtype is torch.bool else item(tensor))
    with unfinished, bools:
        yield


@dataclass(frozen=True)
class _Sparse:
    """A square or rectangular sparse matrix, which is added to a dense one or made dense; its storages are ordinary."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    size: int

    def _nnz(self) -> int:
        return len(self.values)

    def to_dense(self) -> Tensor:
        return self.__radd__(torch.zeros(self.size, self.size, dtype=self.values.dtype))

    def __radd__(self, dense: Tensor) -> Tensor:
        return dense.index_put_((self.rows.long(), self.columns.long()), self.values.to(dense.dtype), accumulate=True)


@contextlib.contextmanager
def _clusters() -> Iterator[None]:
    """AdaMSS clusters rows with scikit-learn: here into parts of one size, and every singular value counts."""
    layer = importlib.import_module("peft.tuners.adamss.layer")
    number = [1]

    def cluster(rows: Tensor, num_subspaces: int, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        number[0] = min(num_subspaces, rows.shape[0])
        return torch.empty(rows.shape[0], dtype=torch.long), number[0]

    def parts(index: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(torch.arange(len(index)).tensor_split(number[0])))

    with contextlib.ExitStack() as replaced:
        for name, new in (("clustering_Z", cluster), ("seg_locations", parts)):
            if hasattr(layer, name):
                replaced.enter_context(mock.patch.object(layer, name, new))
        yield


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _indices(count: int) -> tuple[Tensor, Tensor]:
    return torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
