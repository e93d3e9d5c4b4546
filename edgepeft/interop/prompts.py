"""Prompt tuning and prefix tuning as PEFT stores them: one table of what stands before the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.interop.form import TABLE, Form, Read, Tensors, Written
from edgepeft.methods.prefix_tuning import PrefixTuning
from edgepeft.methods.prompt_tuning import PromptTuning
from edgepeft.placements import attention

_FIRST = "Its classifiers read the state of the first token: there the prompt's, here the input's."
_REMEDY = "Use a method that changes layers, such as lora."


def _write(method: PromptTuning, tensors: Tensors, made: Backbone) -> Written:
    _refuse_encoders(made, "prompt", _FIRST)
    (embeddings,) = tensors.values()
    settings = {"num_virtual_tokens": method.length, "num_transformer_submodules": 1, **_widths(made)}
    return Written({TABLE: embeddings}, settings, _differences(made, pads=True))


def _read(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    """Of an encoder-decoder PEFT stores a prompt for the decoder too, and never reads it."""
    _refuse_encoders(made, "prompt", _FIRST)
    length = int(config["num_virtual_tokens"])
    reader = made.anatomy.stacks[0].owner
    unread = len(tensors[TABLE]) - length
    notes = (f"The last {unread} rows of {TABLE} are left out: PEFT does not read them either.",) if unread > 0 else ()
    found = {f"{reader}.prompt.embeddings": tensors[TABLE][:length]}
    return Read({"length": length}, found, notes + _differences(made, pads=True))


def _write_prefix(method: PrefixTuning, tensors: Tensors, made: Backbone) -> Written:
    _refuse_prefix(made)
    sites = attention.sites(made.model, made.anatomy)
    parts = [tensors[f"{site.path}.prefix.{leaf}"] for site in sites for leaf in ("keys", "values")]
    settings = {
        "num_virtual_tokens": method.length,
        "num_transformer_submodules": 1,
        **_widths(made),
        "token_dim": sites[0].width,
        "prefix_projection": False,
    }
    return Written({TABLE: torch.cat(parts, dim=1)}, settings, _differences(made, pads=False))


def _read_prefix(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    """PEFT too stores what its network makes, not the network."""
    _refuse_prefix(made)
    sites = attention.sites(made.model, made.anatomy)
    names = [f"{site.path}.prefix.{leaf}" for site in sites for leaf in ("keys", "values")]
    found = dict(zip(names, (part.contiguous() for part in tensors[TABLE].chunk(len(names), dim=1)), strict=False))
    return Read({"length": len(tensors[TABLE]), "bottleneck": 0}, found, _differences(made, pads=False))


def _widths(made: Backbone) -> dict[str, int]:
    config: Any = made.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = made.model.get_input_embeddings().weight.shape[1]
    return {"token_dim": width, "num_attention_heads": heads, "num_layers": config.num_hidden_layers}


def _refuse_encoders(made: Backbone, what: str, cause: str) -> None:
    if len(made.anatomy.stacks) == 1 and not attention.is_causal_decoder(made.model, made.anatomy):
        raise UsageError(f"A {what} of an encoder means something else in PEFT.", cause, _REMEDY)


def _refuse_prefix(made: Backbone) -> None:
    if len(made.anatomy.stacks) == 2:
        raise UsageError(
            "A prefix of an encoder-decoder means something else in PEFT.",
            "There the decoder's own attention reads one; here the encoder's and the one between the two as well.",
            _REMEDY,
        )
    _refuse_encoders(made, "prefix", "It numbers the input's positions from the prefix on, edgepeft from 0.")


def _differences(made: Backbone, pads: bool) -> tuple[str, ...]:
    """Where PEFT computes something else with the same numbers."""
    notes = []
    if pads and made.task == "classification":
        notes.append("With a prompt, PEFT classifies at the last token of a row, padding or not: do not pad there.")
    config: Any = made.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        notes.append(f"In PEFT it leaves the sliding window of {window} tokens; in edgepeft it is always seen.")
    return tuple(notes)


_STARTS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
_SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_NETWORK = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
PROMPT = Form(("PROMPT_TUNING", "P_TUNING"), (TABLE,), (*_SIZES, *_STARTS, *_NETWORK), _write, _read)
_PREFIX = (*_SIZES, "prefix_projection", "encoder_hidden_size")
PREFIX = Form(("PREFIX_TUNING",), (TABLE,), _PREFIX, _write_prefix, _read_prefix)
