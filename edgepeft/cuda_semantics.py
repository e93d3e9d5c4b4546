"""Make fake CPU tensors allocate what a CUDA device would: operators that differ are replaced while tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)
ROUNDING = (
    512  # bytes: the caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """While active, dropout, softmax and attention of ``torch.nn.functional`` save and allocate as on CUDA.

    The functions themselves are replaced rather than a torch function mode used, because such a mode is not active when
    activation checkpointing runs a layer again.
    """
    replaced = {
        "dropout": F.dropout,
        "softmax": F.softmax,
        "scaled_dot_product_attention": F.scaled_dot_product_attention,
    }
    functional: Any = F
    functional.dropout, functional.scaled_dot_product_attention = _dropout, _attention
    functional.softmax = lambda *args, **kwargs: _softmax(replaced["softmax"], *args, **kwargs)
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(functional, name, function)


def workspace_bytes(operator: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator's CUDA kernel allocates and frees inside, which its fake does not show."""
    if operator is torch.ops.aten._softmax_backward_data.default:
        return args[0].numel() * args[0].element_size()  # grad · output is materialised
    return 0


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA keeps a boolean mask for backward, the CPU one in the dtype of the input."""
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input


def _softmax(
    original: Any, input: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """CUDA fuses the cast of half precision to fp32 into the kernel."""
    if dtype is torch.float32 and input.dtype in HALF:
        return torch.ops.aten._softmax(input, dim % input.dim(), True)
    return original(input, dim, dtype=dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention for half precision without a mask, memory-efficient attention otherwise: PyTorch's own choice."""
    if attn_mask is None and query.dtype in HALF:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    trains = query.requires_grad or key.requires_grad or value.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, trains, dropout_p, is_causal, scale=scale)[0]
