"""The 4-bit product of bitsandbytes up to 0.43: it keeps its input for backward, though nothing reads it there."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor
from torch.nn import functional as F


class Product(torch.autograd.Function):
    """``MatMul4Bit.apply(x, packed, bias, state)``; later versions of it keep the packed weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.state = state
        ctx.tensors = (x, packed) if ctx.needs_input_grad[0] else (None, None)
        return F.linear(x, functional.dequantize_4bit(packed, state).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _, packed = ctx.tensors
        if packed is None:
            return None, None, None, None
        return (
            torch.matmul(grads[0], functional.dequantize_4bit(packed, ctx.state).to(grads[0].dtype)),
            None,
            None,
            None,
        )


def forward(module: Any, x: Tensor) -> Tensor:
    """``bnb.nn.Linear4bit.forward``, for ``hf.FakeLinear4bit``."""
    bias = None if module.bias is None else module.bias.to(module.compute_dtype)
    return Product.apply(x.to(module.compute_dtype), module.weight, bias, module.state).to(x.dtype)
