"""What adapter_config.json may say: every setting is understood, without effect on what is computed, or refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from edgepeft.errors import UsageError

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
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the backbone's own weights


def check(config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Refuse settings that would be lost.

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


def of_layer(config: Mapping[str, Any], setting: str, layer: str, default: float) -> float:
    """What a pattern (``alpha_pattern``) says of a layer: regular expressions for the end of its name."""
    patterns: Mapping[str, float] = config.get(setting) or {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)
