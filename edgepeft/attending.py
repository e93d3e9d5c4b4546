"""Attention on GPUs where PyTorch has no fused kernel for what a model gives it, and would keep every score.

That is bf16 on GPUs that do not multiply it, and keys that several heads share in fp32. Both are brought to what a
kernel takes, fp32 with keys for each head, and where they were cast, again in backward: what is kept stays bf16.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgepeft import precision


def install() -> None:
    """Have transformers' models call ``attend`` where they would call its ``sdpa``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``.

    Args:
        query: (batch, heads, Q, head width); ``key``, ``value``: (batch, key-value heads, K, head width).
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    if precision.has_fused_attention(query, groups):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, position_bias=position_bias, **arguments
        )
    whole = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # a layer whose heads share nothing

    def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        states = (query.float(), repeat_kv(key.float(), groups), repeat_kv(value.float(), groups))
        found, _ = sdpa_attention_forward(whole, *states, _added(mask), position_bias=_added(bias), **arguments)
        return found.to(query.dtype)

    given = (query, key, value, attention_mask, position_bias)
    cast = query.dtype is not torch.float32
    if cast and torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given):
        return checkpoint(attended, *given, use_reentrant=False), None
    return attended(*given), None


def _added(mask: Tensor | None) -> Tensor | None:
    """What is added to scores, in their dtype."""
    return mask if mask is None or mask.dtype is torch.bool else mask.float()
