"""What operators compute and move: FLOPs and bytes, by class of operator."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from edgepeft.recall import LARGEST
from edgepeft.roofline import Work

THIN = 64
"""A product with a side shorter than this (an adapter's rank, a single token) is limited by what it reads; of those
that are batched, which are attention's heads, one with a side shorter than ``HEAD``: in fp32 heads 32 wide reached 60 %
of a core's peak where ranks of 8 reached 23 %."""

HEAD = 32
"""Attention with heads narrower than this takes about as long as with these. FlashAttention has no narrower kernels
(aten/src/ATen/native/transformers/cuda/flash_attn/kernels of PyTorch 2.13). PyTorch's attention for CPUs took, in ns a
score, forward and backward, on one core of an AMD EPYC in fp32: 1.5 and 4.4 at a width of 8, 1.2 and 2.5 at 16, 1.9 and
5.1 at 32, 3.3 and 9.3 at 64; in bf16 1.8 and 13.5, 1.6 and 14.7, 2.3 and 15.7, 3.7 and 18.4."""

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
_aten: Any = torch.ops.aten
_ATTENTION = "_scaled_dot_product"
_ON_CPU: dict[Any, Any] = {  # the two that PyTorch's own counter leaves out
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
}
_ROWS = (_aten.embedding, _aten.index_select, _aten.gather)  # of a table, only the rows asked for are read
_BATCHED = (_aten.bmm, _aten.baddbmm)
_RANDOM = ("bernoulli", "native_dropout", "normal", "randn", "uniform", "exponential")
_CURVED = ("random", "softmax", "gelu", "silu", "tanh", "sigmoid", "erf", "logsumexp", "native_layer_norm")
_FREE = (  # neither compute nor move
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided),
    *(_aten.detach, _aten._unsafe_view, _aten.lift_fresh, _aten.set_, _aten.resize_, _aten._local_scalar_dense),
)


class Tally:
    """The work of the operators that it is shown, by class.

    Classes: ``matmul.DTYPE``, ``thin.DTYPE`` (see ``THIN``), ``attention.DTYPE``; ``curved`` (softmax, norms,
    activations, random integers) and ``random`` (random fractions), which cost a CPU more than their bytes;
    ``dequantize``, ``optimizer``, ``requantize`` (an optimizer with states in 8 bits), ``elementwise`` (all others that
    compute) and ``view`` (only the call).
    """

    def __init__(self) -> None:
        self._seen: Counter[tuple[_Call, bool]] = Counter()

    def add(
        self,
        operator: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        signature: Hashable | None = None,
    ) -> None:
        """Count one call of a dispatcher operator; calls with the same ``signature``, if it has one, count alike."""
        if operator.namespace in ("prim", "profiler"):
            return
        call = _calls.get(signature)
        if call is None:
            call = _call(operator, args, kwargs, result)
            if signature is not None:
                if len(_calls) >= LARGEST:
                    _calls.clear()
                _calls[signature] = call
        self._seen[call, bool(_growing)] += 1

    def work(self) -> dict[str, Work]:
        """What was counted."""
        sums: dict[str, Work] = {}
        for (call, _), count in self._seen.items():
            _add(sums, call.kind, count * call.calls, count * call.flops, count * sum(call.sizes))
        return sums

    def split(self, size: int) -> tuple[dict[str, Work], dict[str, Work]]:
        """What was counted at the microbatch ``size``, as it would be at microbatch 0 and at microbatch 1.

        Args:
            size: a prime that divides no dimension of the model and no length: what is a multiple of it grows with the
                microbatch. So does everything that ran within ``growing``.
        """
        fixed: dict[str, Work] = {}
        for (call, grows), count in self._seen.items():
            if not grows:
                kept = [each for each in call.sizes if each % size]
                _add(
                    fixed,
                    call.kind,
                    count * call.calls,
                    count * call.flops * bool(call.flops % size),
                    count * sum(kept),
                )
        none = Work(0, 0, 0)
        one = {
            kind: Work(*(a + (b - a) // size for a, b in zip(fixed.get(kind, none), whole, strict=True)))
            for kind, whole in self.work().items()
        }
        return fixed, one


@contextlib.contextmanager
def growing() -> Iterator[None]:
    """What is counted inside is proportional to the microbatch, though not each operator is: a loop over its parts."""
    _growing.append(None)
    try:
        yield
    finally:
        _growing.pop()


_growing: list[None] = []


class _Call(NamedTuple):
    """One call of an operator: its class, what it launches and computes, and the bytes of every tensor it moves."""

    kind: str
    calls: int
    flops: int
    sizes: tuple[int, ...]


_calls: dict[Hashable, _Call] = {}


def _add(sums: dict[str, Work], kind: str, *work: int) -> None:
    sums[kind] = Work(*(a + b for a, b in zip(sums.get(kind, (0, 0, 0)), work, strict=True)))


def _call(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> _Call:
    packet = operator.overloadpacket
    if operator.is_view or packet in _FREE:
        return _Call("view", 1, 0, ())
    inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if packet in _ROWS:
        return _Call("elementwise", 1, 0, 2 * _bytes(outputs))
    moved = _bytes(inputs) + _bytes(outputs if outputs else _written(operator, args, kwargs))
    name = packet.__name__
    if name.startswith("optimizer_update_"):  # bitsandbytes'
        return _Call("requantize" if "8bit" in name else "optimizer", 1, 0, moved)
    if operator.namespace == "bitsandbytes":
        return _Call("dequantize", 1, 0, moved)
    if name.startswith(("_foreach_", "_fused_")):
        return _Call("optimizer", _launches(args), 0, moved)
    if packet in _ON_CPU:
        flops = _ON_CPU[packet](*(tensor.shape for tensor in inputs[: 4 if "backward" in name else 3]))
        return _Call(f"attention.{_DTYPES.get(inputs[0].dtype, 'fp32')}", 1, _padded(flops, inputs[0]), moved)
    count: Any = flop_registry.get(packet)
    if count is None:
        plain = name.lstrip("_").removeprefix("safe_").removeprefix("log_")
        kind = "random" if plain.startswith(_RANDOM) else "curved" if plain.startswith(_CURVED) else "elementwise"
        return _Call(kind, 1, 0, moved)
    dtype = _DTYPES.get(inputs[0].dtype, "fp32")
    flops = int(count(*args, **kwargs, out_val=result))
    if _ATTENTION in name:
        return _Call(f"attention.{dtype}", 1, _padded(flops, inputs[0]), moved)
    shortest = min(side for tensor in inputs if tensor.dim() > 1 for side in tensor.shape[-2:])
    thin = shortest < (HEAD if packet in _BATCHED else THIN)
    return _Call(f"{'thin' if thin else 'matmul'}.{dtype}", 1, flops, moved)


def _padded(flops: int, heads: Tensor) -> int:
    width = heads.shape[-1]
    return flops * max(width, HEAD) // width


def _launches(args: tuple[Any, ...]) -> int:
    """Kernels of an operator on lists of tensors, as ATen/native/cuda/MultiTensorApply.cuh of PyTorch 2.13 packs them.

    A launch takes at most 320 blocks of 65,536 elements, and fewer tensors the more lists there are.
    """
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    if not lists:
        return 1
    most = (110, 64, 48, 36, 30)[min(len(lists), 5) - 1]
    blocks = sum(-(-tensor.numel() // 65536) for tensor in lists[0])
    return max(-(-len(lists[0]) // most), -(-blocks // 320))


def _bytes(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Bytes of the elements of each; what is expanded is read once, and a sparse tensor's parts are other tensors."""
    whole = (t for t in tensors if t.layout is torch.strided)
    return tuple(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in whole)


def _written(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator without results changes in place."""
    declared = operator._schema.arguments
    given = [*zip(declared, args, strict=False), *((each, kwargs.get(each.name)) for each in declared[len(args) :])]
    changed = [
        value
        for each, value in given
        if each.alias_info is not None and each.alias_info.is_write
        if each.name not in ("grads", "g")  # of fused optimizers, which write there only under a gradient scaler
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]
