"""Tokens of a method's own stand before the input of a decoder: the input's positions begin behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgepeft import backbone
from edgepeft.errors import UsageError
from edgepeft.placements.ladder import named

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shift(decoder: Any, length: int) -> None:
    """Number the tokens that a decoder reads from ``length`` on."""
    decoder.positions_before = length
    decoder.register_forward_pre_hook(_shift, with_kwargs=True)


def check(method: str, length: int, configuration: PretrainedConfig) -> None:
    """Refuse tokens that leave no position to the input.

    Raises:
        UsageError: see above.
    """
    most = backbone.positions(configuration)
    if most is not None and length >= most:
        raise UsageError(
            f"{method}: {length} tokens before the input leave it no position.",
            f"The model has {most} positions in all.",
            f"Use --set options.length={max(1, most // 10)} or so, and no longer inputs than the rest.",
        )


def _shift(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    given = named(decoder, args, kwargs)
    del given["self"]
    ids = given.get("position_ids")
    if ids is None:
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        ids = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    positions: Any = decoder.positions_before
    return (), {**given, "position_ids": ids + positions}
