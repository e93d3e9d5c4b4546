"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepeft.precision import matmul_dtype

CHUNK_BYTES = 24 << 20  # of fp32 logits at a time: small against any model, large enough for an efficient matmul


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """The summed cross-entropy of ``hidden @ weight.T + bias`` against ``targets``, in nats.

    Gradients are computed chunk by chunk in the forward pass, while a chunk's logits are there anyway, as Liger Kernel
    does (arXiv 2410.10989, section 3.2): peak memory is one chunk of logits plus the gradient of ``hidden``.

    Args:
        hidden: (positions, width).
        weight: (vocabulary, width).
        bias: (vocabulary,), or None.
        targets: (positions,) int64.
        softcap: logits x become softcap · tanh(x / softcap), as in Gemma 2.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, softcap)


def chunks(positions: int, vocabulary: int) -> list[slice]:
    """Slices of positions whose fp32 logits fit ``CHUNK_BYTES``; at least 16 positions each."""
    size = max(16, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(positions, vocabulary) in fp32."""
    dtype = matmul_dtype(hidden.dtype, hidden.device)
    if dtype is hidden.dtype:
        return F.linear(hidden, weight, bias).float()
    logits = torch.empty(len(hidden), len(weight), device=hidden.device)
    wide = hidden.to(dtype)
    for rows in _blocks(weight):  # never the whole weight in fp32
        torch.mm(wide, weight[rows].to(dtype).t(), out=logits[:, rows])
    return logits if bias is None else logits.add_(bias)


def times(gradient: Tensor, weight: Tensor) -> Tensor:
    """(positions, vocabulary) in fp32 times the weight: (positions, width) in the weight's dtype."""
    dtype = matmul_dtype(weight.dtype, weight.device)
    if dtype is weight.dtype:
        return gradient.to(dtype) @ weight
    total = torch.zeros(len(gradient), weight.shape[1], device=weight.device)
    for rows in _blocks(weight):
        total.addmm_(gradient[:, rows], weight[rows].to(dtype))
    return total.to(weight.dtype)


def _blocks(weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part in chunks(len(hidden), len(weight)):
            logits = logits_of(hidden[part], weight, bias)
            slope = None
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square()
                logits = logits.mul_(softcap)
            target = targets[part].unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            total += (normalizer - logits.gather(1, target)).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient = logits.sub_(normalizer).exp_()  # in place: probabilities where the logits were
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            if slope is not None:
                gradient.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[part] = times(gradient, weight)
            gradient = gradient.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            del logits, gradient, slope
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # in place below, and freed as soon as the caller is done with them
        return (*(None if g is None else g.mul_(grad[0].to(g.dtype)) for g in gradients), None, None)
