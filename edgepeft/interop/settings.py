"""What adapter_config.json may say: every setting is understood, without effect on what is computed, or refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from edgepeft.errors import UsageError
from edgepeft.peft_config import FILE

REMEDY = "Merge it with PEFT (merge_and_unload), and give edgepeft the merged model."

# Which layers are changed is read off the tensors; the rest says how training began, or how PEFT goes about things.
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size", "eva_config"),
        *("init_weights", "init_ia3_weights", "feedforward_modules"),
    }
)
_COUNTS = ("r", "init_r", "target_r", "num_virtual_tokens")
_SCALES = ("lora_alpha", "alpha")
_PATTERNS = ("alpha_pattern", "rank_pattern")
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the backbone's own weights


def check(config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Refuse settings that would be lost, and values that nothing could be computed with.

    Args:
        understood: those that the format translates.

    Raises:
        UsageError: names the first one.
    """
    for name, value in config.items():
        if name == "init_lora_weights":
            lost = value not in _HARMLESS_STARTS
        else:
            lost = bool(value) and value != "none" and name not in _HARMLESS and name not in understood
        if lost:
            raise UsageError(
                f"A PEFT adapter with {name} = {value!r} cannot be read.",
                "edgepeft's method of this kind has nothing that does the same.",
                REMEDY,
            )
        if name in understood and value is not None and (expected := _expected(name, value)):
            raise UsageError(
                f"A PEFT adapter with {name} = {value!r} cannot be read.",
                f"It must be {expected}.",
                f"Correct it in {FILE}, or save the adapter again.",
            )


def _expected(name: str, value: Any) -> str:
    """What a setting must be, where it is something else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
    if name in _COUNTS and not (number and value == int(value)):
        return "a whole number above 0"
    if name in _SCALES and not number:
        return "a number above 0"
    return "an object" if name in _PATTERNS and not isinstance(value, dict) else ""


def of_layer(config: Mapping[str, Any], setting: str, layer: str, default: float) -> float:
    """What a pattern (``alpha_pattern``) says of a layer: regular expressions for the end of its name."""
    patterns: Mapping[str, float] = config.get(setting) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
