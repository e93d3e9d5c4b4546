"""What a model's config.json says about its size, read without transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgepeft.errors import UsageError

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
POSITIONS = ("max_position_embeddings", "n_positions")
# These count their positions from pad_token_id + 1.
_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "data2vec-text",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "xmod",
)

_COUNTED = ("vocab_size", "hidden_size", "d_model", "n_embd", "num_attention_heads", "num_heads", "n_head", *LAYERS)


def check(name: str, model: Mapping[str, Any]) -> None:
    """Refuse a configuration that no model can be built from, as far as its numbers tell.

    Raises:
        UsageError: see above.
    """
    if "encoder_layers" in model and not any(f in model for f in LAYERS):  # BART and its like, Whisper
        raise UsageError(
            f"{name} is of an architecture that edgepeft does not know ({model.get('model_type')}).",
            "Its encoder_layers and decoder_layers are of no known build.",
            "Of models that read one text and write another, use one of T5's kind: t5-small, flan-t5-base.",
        )
    wrong = next((f for f in _COUNTED if f in model and not (isinstance(model[f], int) and model[f] > 0)), None)
    heads, shared = model.get("num_attention_heads"), model.get("num_key_value_heads")
    if wrong is not None:
        cause = f"Its {wrong} is {model[wrong]!r}, and must be a whole number above 0."
    elif isinstance(heads, int) and shared is not None and not (isinstance(shared, int) and shared > 0):
        cause = f"Its num_key_value_heads is {shared!r}, and must be a whole number above 0."
    elif isinstance(heads, int) and shared is not None and heads % shared:
        cause = f"Its {heads} attention heads cannot share {shared} of keys and values."
    elif model.get("model_type") in _FROM_PADDING and not isinstance(model.get("pad_token_id", 1), int):
        cause = f"Its pad_token_id is {model['pad_token_id']!r}, and its positions are counted from there on."
    else:
        return
    raise UsageError(f"The configuration of {name} describes no model.", cause, "Correct its config.json.")


def depth(model: Mapping[str, Any]) -> int:
    """How deep a model is: the layers of each stack or, where stacks differ, their greatest common divisor.

    0 where layers are counted by other names, as BART's are: of architectures that ``anatomy`` refuses.
    """
    return math.gcd(*(int(model[name]) for name in LAYERS if model.get(name)))


def at_depth(model: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same model at another depth: stacks that differ stay in the same ratio, so that they grow in step."""
    full = depth(model)
    fields: dict[str, Any] = {
        name: value // full * layers if name in LAYERS and value else value for name, value in model.items()
    }
    if fields.get("layer_types"):
        fields["layer_types"] = list(fields["layer_types"])[:layers]
    return fields


def positions(model: Mapping[str, Any]) -> int | None:
    """The longest sequence the model can read, or None when its positions are relative and unbounded (T5)."""
    kind = model.get("model_type")
    if kind in ("t5", "mt5", "umt5"):
        return None
    found = next((int(model[name]) for name in POSITIONS if model.get(name)), None)
    offset = model.get("pad_token_id", 1) + 1 if kind in _FROM_PADDING else 0
    return None if found is None else found - offset


def positions_left(model: str, most: int | None, method: str | None, taken: int, tokens: int | None) -> int | None:
    """How many tokens of an example fit into a model's positions; None if they have no end.

    Args:
        most: positions of the model, of which the method takes ``taken`` for its own tokens.
        tokens: of an example, as asked for.

    Raises:
        UsageError: none are left, or fewer than asked for.
    """
    if most is None:
        return None
    if taken >= most:
        raise UsageError(
            f"{method} leaves {model} no room for an example.",
            f"It takes {taken} positions for its own tokens, and the model has {most}.",
            f"Give it fewer: `edgepeft methods {method}` has the options.",
        )
    if tokens is not None and tokens > most - taken:
        raise UsageError(
            f"{model} cannot read {tokens} tokens.",
            f"It has {most} positions" + (f", of which {method} needs {taken} for its own." if taken else "."),
            f"Use --seq-len {most - taken} or less.",
        )
    return most - taken
