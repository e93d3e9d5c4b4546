"""Methods that are a configuration of HF PEFT, ``peft:PATH``: where it is, what it says, and whether it can be used.

Nothing but ``parse`` imports PEFT, and with it torch.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.errors import UsageError, nearest

PREFIX = "peft:"
FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT's save_pretrained names them
TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
_REMEDY = "Give an adapter_config.json as PEFT's save_pretrained writes it."

# What cannot be trained here: why, and what to do instead.
_TYPES = {
    "ADALORA": (
        "What its schedule of ranks has seen is in no tensor of PEFT's: no run could go on from a checkpoint.",
        "Use --method adalora; `edgepeft adapter` writes it for PEFT.",
    ),
    "ADAMSS": (
        "How many numbers it trains follows from a clustering of the weights (scikit-learn's), and the plan has none.",
        "Installing scikit-learn does not help. Use another type (docs/peft.md), or --method lora.",
    ),
    "SHADOW": ("It sends a second state through the layers, which the plan cannot follow.", "Use --method lst."),
    "XLORA": ("It mixes adapters that other runs trained.", "Train one of those."),
}
_EITHER = (typing.Union, types.UnionType)
_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}
_NEEDS_DATA = "It is computed from data, before training, by a script of its own."
_OWN_LOSS = "It adds a term to the loss where PEFT computes that, and edgepeft has a loss of its own."
_FIELDS = {
    "eva_config": _NEEDS_DATA,
    "corda_config": _NEEDS_DATA,
    "lora_ga_config": _NEEDS_DATA,
    "monteclora_config": _OWN_LOSS,
    "kasa_config": _OWN_LOSS,
    "loftq_config": "It packs the backbone anew; --method lora --set options.loftq=1 does that here.",
    "alora_invocation_tokens": "It looks for tokens in the input, which only PEFT's own model shows to its layers.",
    "arrow_config": "It mixes adapters that other runs trained.",
    "layer_replication": "It changes the backbone's depth, which the plan is made for.",
    "megatron_config": "It imports a module that the file names.",
    "runtime_config": "It is not part of a configuration file.",
    "use_asa": "What its schedule has seen is in no tensor: no run could go on from a checkpoint.",
    "sample_at_inference": "Its model computes something else each time, which nothing can be measured against.",
    "prompt_tuning_init_state_dict_path": "It reads a file that may hold code.",
}


def path_of(method: str | None) -> Path | None:
    """The file that a method's name means; None if the name is another kind's."""
    if method is None or not method.startswith(PREFIX):
        return None
    path = Path(method.removeprefix(PREFIX))
    return path / FILE if path.is_dir() else path


def text_of(method: str) -> str | None:
    """The configuration that a method's name means; None if the name is another kind's.

    Raises:
        UsageError: it cannot be read.
    """
    path = path_of(method)
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"There is no PEFT configuration {str(path)!r}.",
            str(error),
            f"Give peft: and an {FILE}, or a folder with one, as PEFT's save_pretrained writes it.",
        ) from error


def parse(text: str, source: str) -> Any:
    """A new ``PeftConfig``, to be trained.

    Raises:
        UsageError: PEFT is not installed, or this is no configuration, or one that cannot be trained here.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise UsageError(
            f"{source} needs HF PEFT.", "It is not installed.", "Install it: pip install 'edgepeft[peft]'"
        ) from error
    import peft

    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{source} is not JSON.", str(error), _REMEDY) from error
    kind = fields.pop("peft_type", None) if isinstance(fields, dict) else None
    known = {each.value: made for each, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind not in known:
        cause = "It has no peft_type." if kind is None else f"PEFT {peft.__version__} knows no peft_type {kind!r}."
        raise UsageError(f"{source} is no configuration of PEFT.", cause, nearest(str(kind), known))
    if kind in _TYPES:
        raise UsageError(f"{source} cannot be trained here, as it is of type {kind}.", *_TYPES[kind])
    accepted = {field.name for field in dataclasses.fields(known[kind]) if field.init}
    if unknown := sorted(fields.keys() - accepted):
        raise UsageError(
            f"{source}: PEFT {peft.__version__} has no {unknown[0]!r} for {kind}.",
            "It would be ignored, and another method trained than the file describes.",
            f"Take it out of the file, or upgrade PEFT. {nearest(unknown[0], accepted)}",
        )
    for name in _FIELDS:
        if fields.get(name):
            raise UsageError(f"{source}: {name} cannot be used here.", _FIELDS[name], "Take it out of the file.")
    _check_types(fields, known[kind], source)
    _check_values(fields, source)
    plain = {name: value for name, value in fields.items() if name not in ("inference_mode", "auto_mapping")}
    if kind == "CPT":
        plain["task_type"] = plain.get("task_type") or TASKS["causal-lm"]
    try:
        made = known[kind](**plain)
    except Exception as error:
        raise UsageError(f"{source} is refused by PEFT.", f"{first_line(error)}.", _REMEDY) from error
    if made.is_prompt_learning and not (made.num_virtual_tokens or 0) > 0:
        raise UsageError(
            f"{source}: num_virtual_tokens cannot be {json.dumps(made.num_virtual_tokens)}.",
            "It is how many tokens the prompt has, at least 1.",
            'Say how many in the file, such as "num_virtual_tokens": 20.',
        )
    return made


def _check_types(fields: Mapping[str, Any], kind: Any, source: str) -> None:
    """Refuse values that PEFT would take and stumble over later."""
    hints = typing.get_type_hints(kind)
    loose = (dict, dict | None)
    numbers = [name for name in ("rank_pattern", "alpha_pattern") if hints.get(name) in loose]
    hints |= dict.fromkeys(numbers, dict[str, int] | None)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in fields.items():
        if value == defaults[name] or _is_of(value, hints[name], inexact="alpha" in name):
            continue
        raise UsageError(
            f"{source}: {name} cannot be {json.dumps(value, ensure_ascii=False)}.",
            f"It must be {' or '.join(dict.fromkeys(_in_words(hints[name])))}.",
            "Correct it there, or leave it out, where PEFT has a default.",
        )


def _is_of(value: Any, hint: Any, *, inexact: bool) -> bool:
    """Whether a value of JSON is of a type; which words and which objects a field knows is PEFT's to say.

    Args:
        inexact: whether a fraction will do for a whole number: PEFT calls scales whole that need not be.
    """
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _EITHER:
        return any(_is_of(value, part, inexact=inexact) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) for part in parts)
    if origin in (int, float):
        whole = origin is int and not inexact
        return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_is_of(each, *parts, inexact=inexact) for each in value)
    if origin is dict:
        within = parts[1:] or (Any,)
        return isinstance(value, dict) and all(_is_of(each, *within, inexact=inexact) for each in value.values())
    return isinstance(value, origin) if origin in _IN_WORDS else True


def _in_words(hint: Any) -> list[str]:
    """The types that a field may have, as people say them."""
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _EITHER:
        return [word for part in parts for word in _in_words(part)]
    if origin is typing.Literal:
        return [json.dumps(part) for part in parts]
    if origin is list and parts and (inner := _in_words(parts[0])):
        return [f"a list ({inner[0]} each)"]
    return [_IN_WORDS[origin]] if origin in _IN_WORDS else []


def _check_values(fields: Mapping[str, Any], source: str) -> None:
    """Refuse values that would load code, or that no second run could make again."""
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("eva", "corda", "lora_ga", "loftq")):
        raise UsageError(f"{source}: init_lora_weights = {start!r} cannot be used here.", _NEEDS_DATA, _REMEDY)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise UsageError(
            f"{source}: init_lora_weights = {start!r} cannot be used here.",
            "It is random, and changes the backbone: an adapter could not be put back.",
            'Use "pissa", which is exact.',
        )
    if (fields.get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise UsageError(
            f"{source}: tokenizer_kwargs asks for trust_remote_code.", "Code of a repository is not run.", _REMEDY
        )


def first_line(error: Exception) -> str:
    """What an exception says first, without a full stop; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
