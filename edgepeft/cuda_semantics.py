"""Make fake CPU tensors allocate what a CUDA device would: operators that differ are replaced while tracing.

What a kernel allocates inside is in PyTorch's and bitsandbytes' sources; each number below says where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepeft.cuda_device import Device

HALF = (torch.float16, torch.bfloat16)
ROUNDING = (
    512  # bytes: the caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
)
_aten: Any = torch.ops.aten

PRODUCTS = frozenset(
    overload
    for packet in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten.addmv, _aten.mv)
    for overload in (getattr(packet, name) for name in packet.overloads())
)
"""Operators that call cuBLAS."""


@contextlib.contextmanager
def emulated(device: Device) -> Iterator[None]:
    """While active, dropout, softmax and attention of ``torch.nn.functional`` save and allocate as on CUDA.

    The functions themselves are replaced rather than a torch function mode used, because such a mode is not active when
    activation checkpointing runs a layer again. Optimizers and clipping work on lists of tensors, as they do by
    default on CUDA: that takes temporaries as large as all of a list together.
    """
    import torch.optim.optimizer as optimizers

    functional, optimizer_module, tensor_type, root = F, optimizers, Tensor, torch
    softmax, tensor_softmax, root_softmax = F.softmax, Tensor.softmax, torch.softmax

    replaced: list[tuple[Any, str, Any]] = [
        (functional, "dropout", _dropout),
        (functional, "softmax", lambda input, dim=-1, _stacklevel=3, dtype=None: _softmax(softmax, input, dim, dtype)),
        (tensor_type, "softmax", lambda input, dim=-1, dtype=None: _softmax(tensor_softmax, input, dim, dtype)),
        (root, "softmax", lambda input, dim=-1, dtype=None: _softmax(root_softmax, input, dim, dtype)),
        (functional, "scaled_dot_product_attention", _attention_on(device)),
        (optimizer_module, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "cpu"]),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def workspace_bytes(operator: Any, args: tuple[Any, ...], *, cuda: bool) -> tuple[int, ...]:
    """Bytes that an operator's kernel allocates and frees inside, which its fake does not show."""
    if operator is _aten.logsumexp.default:
        # ``(self - maxes).exp_()`` in logsumexp_out_impl (native/ReduceOps.cpp), on every device
        return (args[0].numel() * args[0].element_size(),)
    if not cuda and operator.namespace != "bitsandbytes":
        return ()
    kernels = _WORKSPACES if cuda else _ON_CPU
    found = kernels.get(operator.name().partition(".")[0]) if isinstance(operator, torch._ops.OpOverload) else None
    return found(args) if found is not None else ()


def _softmax_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    """``Tensor tmp = grad * output`` in softmax_backward_cuda_out (aten/src/ATen/native/cuda/SoftMax.cu)."""
    return (args[0].numel() * args[0].element_size(),)


def _flash_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    """mha_bwd (flash_attn/flash_api.cpp): an fp32 dq accumulator and row sums, and dk, dv for all query heads."""
    query, key = args[1], args[2]
    batch, heads, rows, width = query.shape
    rows = -(-rows // 128) * 128
    width = -(-width // 32) * 32
    accumulator = 4 * batch * heads * rows * width
    sums = 4 * batch * heads * rows
    if key.shape[1] == heads:
        return (accumulator + sums,)
    expanded = batch * heads * key.shape[2] * key.shape[3] * key.element_size()
    return (accumulator + sums + 2 * expanded,)


def _efficient_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    """mem_eff_attention/kernel_backward.h: half precision accumulates the gradient of the queries in fp32."""
    query = args[1]
    if query.dtype not in HALF:
        return ()
    batch, heads, rows, width = query.shape
    return (4 * batch * heads * -(-rows // 64) * 64 * -(-width // 64) * 64,)


def _gemm_4bit(args: tuple[Any, ...]) -> tuple[int, ...]:
    """bitsandbytes (backends/cuda/ops.py, _dequant_linear_fallback) unpacks the weight for more than a few rows."""
    states, shape = args[0], args[2]
    rows = states.numel() // states.shape[-1]
    return (shape[0] * shape[1] * states.element_size(),) if rows > _GEMM_4BIT_ROWS else ()


def _eight_bit_update(args: tuple[Any, ...]) -> tuple[int, ...]:
    """bitsandbytes' backends/cpu/ops.py: both moments and the gradient in fp32, the root of one, and a quotient."""
    return (5 * 4 * args[2].numel(),)


def _small_update(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The same file, states in fp32: the gradient, the root of the second moment and a sum with it."""
    return (3 * 4 * args[2].numel(),)


_GEMM_4BIT_ROWS = 512  # _gemm_4bit_use_custom_cuda: up to here a kernel reads packed weights
_WORKSPACES: dict[str, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
_ON_CPU: dict[str, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {  # CUDA's kernels for these work in place
    "bitsandbytes::optimizer_update_8bit_blockwise": _eight_bit_update,
    "bitsandbytes::optimizer_update_32bit": _small_update,
}


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA keeps a boolean mask for backward, the CPU one in the dtype of the input."""
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input


def _softmax(original: Any, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """CUDA fuses the cast of float16 to fp32 into the kernel, and only that one (native/SoftMax.cpp)."""
    if dtype is torch.float32 and input.dtype is torch.float16:
        return _aten._softmax(input, dim % input.dim(), True)
    return original(input, dim, dtype=dtype)


def _attention_on(device: Device) -> Callable[..., Tensor]:
    """Scaled dot-product attention by the kernel that PyTorch chooses on ``device`` (cuda/sdp_utils.cpp)."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is None and query.dtype in HALF and device.has_flash and query.shape[-1] <= 256:
            return _flash(query, key, value, dropout_p, is_causal, scale)
        unknown = query.dtype is torch.bfloat16 and not device.has_flash
        if unknown or key.shape[1] != query.shape[1]:  # the scores are there as a whole
            return _aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)

    return attention


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """Heads are padded to a width that is a multiple of 8 (native/transformers/attention.cpp)."""
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width % 8:
        query, key, value = (F.pad(states, (0, 8 - width % 8)) for states in (query, key, value))
    found = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return found[..., :width]


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Memory-efficient attention; its mask is added to the scores and padded to a multiple of 8."""
    if mask is not None:
        if mask.dtype is torch.bool:
            mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
        if mask.shape[-1] % 8:
            columns = mask.shape[-1]
            mask = F.pad(mask, (0, 8 - columns % 8))[..., :columns]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    operator = _aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, mask, trains, dropout_p, is_causal, scale=scale)[0]
