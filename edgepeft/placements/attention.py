"""Every attention of a model, and a way to put keys and values before those it computes itself.

Attentions of transformers look up the function that does their arithmetic by a name in their configuration. One that
reads more gets a configuration of its own with a name of ours, so that nothing else in the model changes. What is put
before is put there after the key-value cache was read and written: it never enters the cache.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.tasks import default_task

CHILD = "prefix"  # a module that gives the states read before an attention's own; absent where a call brings them
SHARES = "prefix_shares"  # log of the share of its weight that each query gives each prefix token
PROMPT, RECORD = "prompt_states", "prompt_record"

States = tuple[Tensor, Tensor]
"""Keys and values, each (length, key-value heads × head width)."""

_READING = "edgepeft-reading-"
_OVER = ("sdpa", "eager")


@dataclass(frozen=True)
class Site:
    """One attention.

    Attributes:
        path: dotted name of its module.
        group: the stack it belongs to, and whether it reads another stack's states.
        hidden: width of what it reads.
        width: of its keys, and of its values: key-value heads × head width.
    """

    path: str
    group: tuple[int, bool]
    hidden: int
    width: int


def sites(model: nn.Module, anatomy: Anatomy) -> list[Site]:
    """All attentions, in the order of the model's layers."""
    found = []
    for block in anatomy.blocks:
        for cross in ("", "cross_"):
            if f"{cross}key" not in block.linears:
                continue
            (query,), (key,) = block.linears[f"{cross}query"], block.linears[f"{cross}key"]
            reader: Any = model.get_submodule(query)
            keys: Any = model.get_submodule(key)
            output: Any = model.get_submodule(block.linears[f"{cross}output"][0])
            # Fused, queries are as wide as what the output layer reads, and keys and values share the rest.
            width = (keys.out_features - output.in_features) // 2 if query == key else keys.out_features
            found.append(Site(key.rpartition(".")[0], (block.stack, bool(cross)), reader.in_features, width))
    return found


def is_causal_decoder(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the model is a decoder alone: every token reads those before it, and nothing else is read."""
    whole: Any = model
    first: Any = model.get_submodule(sites(model, anatomy)[0].path)
    causal = getattr(first, "is_causal", None)  # an encoder may be set up to decode; older attentions say nothing
    return len(anatomy.stacks) == 1 and (default_task(whole.config) == "causal-lm" if causal is None else bool(causal))


def reads_more(attention: nn.Module) -> None:
    """Let an attention read keys and values before its own: of its child ``prefix``, or those its call brings."""
    module: Any = attention
    if not (hasattr(module, "config") and hasattr(sys.modules[type(module).__module__], "eager_attention_forward")):
        raise UsageError(
            f"Nothing can be put before the keys and values of {type(module).__name__}.",
            "It does its arithmetic itself, and looks no function up that does.",
            "Use a method without prefixes and prompts: lora, houlsby.",
        )
    over = module.config._attn_implementation
    if over not in _OVER:
        raise UsageError(
            f"Nothing can be put before the keys and values of {over} attention.",
            "Its mask has another form.",
            "Load the model with attn_implementation='sdpa'.",
        )
    _functions().register(_READING + over, partial(_attend, over))
    module.config = copy.copy(module.config)
    module.config._attn_implementation = _READING + over


def _attend(
    over: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> Any:
    """An attention function of transformers, with states of length P put before K keys and values.

    Args:
        query: (batch, heads, Q, head width); ``key``, ``value``: (batch, key-value heads, K, head width).
        attention_mask: (batch or 1, 1 or heads, Q, K), True or 0 where a token is seen; None for all, or
            for causal with sdpa. Some families give it by name.
    """
    mask = attention_mask
    inner: Callable[..., Any] = _functions().get_interface(over, _eager_of(module))
    record, prompt = arguments.pop(RECORD, None), arguments.pop(PROMPT, None)
    if record is not None:
        record.append((key, value))
        return inner(module, query, key, value, mask, **arguments)
    shares = arguments.pop(SHARES, None)
    before = _before(module, prompt, key)
    length = before[0].shape[2]
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and over == "sdpa" and causal and query.shape[2] > 1:
        order = torch.arange(key.shape[2], device=key.device)
        mask = (order <= order[: query.shape[2], None])[None, None]
    if shares is not None:
        mask = _weighing(shares, length, mask, query, key)
    elif mask is not None:
        seen = (mask.new_ones if mask.dtype is torch.bool else mask.new_zeros)((*mask.shape[:-1], length))
        mask = torch.cat([seen, mask], dim=-1)
    if arguments.get("position_bias") is not None:  # T5: no token is near or far from what stands before all of them
        arguments["position_bias"] = F.pad(arguments["position_bias"], (length, 0))
    key, value = (torch.cat([b, own], dim=2) for b, own in zip(before, (key, value), strict=True))
    return inner(module, query, key, value, mask, **arguments)


def _before(module: nn.Module, prompt: Any, key: Tensor) -> tuple[Tensor, Tensor]:
    """The states to put before ``key`` and its values, in its shape and dtype."""
    batch, heads, _, width = key.shape
    if prompt is not None:
        states = prompt[module.layer_idx]  # (1, heads, length, width) already
    elif (made := dict(module.named_children()).get(CHILD)) is None:
        raise UsageError(
            f"The states of a prompt do not reach {type(module).__name__}.",
            "The layer around it does not hand on what it is called with.",
            "Use a method without prompts: lora, houlsby, prefix_tuning.",
        )
    else:
        states = [s.view(-1, heads, width).transpose(0, 1)[None] for s in made()]
    keys, values = (state.to(key.dtype).expand(batch, -1, -1, -1) for state in states)
    return keys, values


def _weighing(shares: Tensor, length: int, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """``mask`` as what is added to scores, behind ``shares`` (batch, Q, P or 1), whose exponents multiply weights.

    Returns:
        (batch, 1 or heads, Q, P + K), where P is ``length``.
    """
    batch, _, queries, _ = query.shape
    if mask is None:
        mask = shares.new_zeros(1, 1, 1, key.shape[2])
    elif mask.dtype is torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    heads = mask.shape[1]
    own = mask.to(query.dtype).expand(batch, heads, queries, key.shape[2])
    shares = shares.to(query.dtype)[:, None].expand(batch, heads, queries, length)
    return torch.cat([shares, own], dim=-1)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """A family's own arithmetic: each has a function of this name beside its attention."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # seconds: not for a list of methods

    return ALL_ATTENTION_FUNCTIONS
