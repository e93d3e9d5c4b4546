"""Models that are refused by what their configuration says, before any work: packed ones, those of images, absurd ones.

Their weights are not what would be planned, or have no place here, or would keep a machine busy for nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from edgepeft import catalog
from edgepeft.catalog import fields
from edgepeft.errors import UsageError

_PARTS = {"vision_config": "images", "audio_config": "sound"}  # a model of text alone has none of these
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "intermediate_size", "d_ff", "n_inner", "hidden_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "head_dim", "d_kv")
_MOST = {  # of each: a good deal more than any model has
    **dict.fromkeys(fields.LAYERS, 10_000),
    **dict.fromkeys(("vocab_size", *_WIDTHS, *_HEADS), 10_000_000),
    **dict.fromkeys(fields.POSITIONS, 1_000_000_000),
}


def check(name: str, model: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be tuned here, going by its configuration.

    Raises:
        UsageError: see above.
    """
    _check_parts(name, model)
    if packed := model.get("quantization_config") or model.get("compression_config"):
        raise UsageError(
            f"The weights of {name} are already quantised, by {_packer(packed)}.",
            "Its config.json has a quantization_config. Methods are planned and trained on the plain weights.",
            "Give the original model: edgepeft packs it itself, with --precision nf4 or int8.",
        )
    fields.check(name, model)
    for field, most in _MOST.items():
        value = model.get(field)
        if isinstance(value, int) and not 0 < value <= most:
            raise UsageError(
                f"The configuration of {name} describes no model.",
                f"Its {field} is {value}, and must be above 0 and no more than {most:,}.",
                "Correct its config.json.",
            )


def _check_parts(name: str, model: Mapping[str, Any]) -> None:
    """Refuse a model whose text is only a part of what it reads."""
    others = [what for field, what in _PARTS.items() if isinstance(model.get(field), Mapping)]
    if not others:
        return
    inner = str((model.get("text_config") or model).get("model_type"))
    family = re.split(r"[^a-z]", inner)[0]
    alike = [each for each in catalog.names() if each.startswith(family)] or catalog.names()
    raise UsageError(
        f"{name} is a model of text and {' and '.join(others)} ({model.get('model_type')}).",
        "edgepeft tunes models of text.",
        f"Give a model of text alone, such as {' or '.join(difflib.get_close_matches(inner, alike, n=2, cutoff=0))}.",
    )


def _packer(packed: Any) -> str:
    said = packed if isinstance(packed, Mapping) else {}
    older = "bitsandbytes" if any("load_in" in str(field) for field in said) else "another tool"
    return str(said.get("quant_method") or older)
