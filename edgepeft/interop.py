"""Adapters in HF PEFT's folder format (adapter_config.json, adapter_model.safetensors), out and in, without PEFT.

Written and read: lora (with rank-stabilised scales), dora, adalora and ln_tuning. PEFT names modules, edgepeft the
roles of ``anatomy``; the model's structure, built without weights, translates between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgepeft import adapter, backbone
from edgepeft.adapter import Card
from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import atomic_directory, write_json
from edgepeft.methods import base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# method: PEFT's name of it, and of each of its tensors in a module
_LAYERS: dict[str, tuple[str, dict[str, str]]] = {
    "lora": ("LORA", {"delta.a": "lora_A.weight", "delta.b": "lora_B.weight"}),
    "dora": (
        "LORA",
        {
            "delta.low.a": "lora_A.weight",
            "delta.low.b": "lora_B.weight",
            "delta.magnitude": "lora_magnitude_vector",
        },
    ),
    "adalora": ("ADALORA", {"delta.a": "lora_A", "delta.b": "lora_B", "delta.e": "lora_E"}),
    "ln_tuning": ("LN_TUNING", {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}),
}


def write(folder: Path, target: Path) -> None:
    """Write the adapter in ``folder`` as PEFT's ``PeftModel.from_pretrained`` reads it.

    Raises:
        UsageError: PEFT's format has no place for this method or one of its options.
    """
    card, tensors = adapter.read_card(folder), adapter.read_tensors(folder / adapter.TENSORS)
    if card.method not in _LAYERS:
        raise UsageError(
            f"An adapter of {card.method} cannot be written for PEFT.",
            "PEFT has no such method, or stores it in a way edgepeft does not translate.",
            f"Merge it instead: edgepeft merge. These can be written: {', '.join(_LAYERS)}.",
        )
    kind, names = _LAYERS[card.method]
    parts = _anatomy(card.model, card.task, card.labels)
    known = set(parts.linears(ROLES)) if kind != "LN_TUNING" else set(parts.norms)
    written, targets, whole = {}, set(), set()
    for name, tensor in tensors.items():
        module, own = _split(name, names)
        if own and module in known:
            targets.add(module)
            written[f"{_PREFIX}{module}.{names[own]}"] = _shaped(tensor, names[own])
        elif not own or kind == "LN_TUNING":
            whole.add(name.rpartition(".")[0])  # a head, trained as it is
            written[_PREFIX + name] = tensor
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": _TASKS[card.task],
        "base_model_name_or_path": card.model,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
        **_settings(card),
    }
    with atomic_directory(target) as made:
        save_file({name: tensor.contiguous() for name, tensor in written.items()}, made / WEIGHTS)
        write_json(made / CONFIG, config)


def read(folder: Path, target: Path) -> None:
    """Write the PEFT adapter in ``folder`` as one of edgepeft's.

    Raises:
        UsageError: it is of a kind, or has a setting, that edgepeft does not translate.
        EdgePeftError: a file is missing or damaged.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, model = config["peft_type"], config["base_model_name_or_path"]
        task = {theirs: ours for ours, theirs in _TASKS.items()}[config["task_type"]]
    except (OSError, ValueError, KeyError) as error:
        raise EdgePeftError(
            f"{folder / CONFIG} cannot be read.",
            f"It is missing, damaged or names no model and task: {error!r}.",
            "Give a folder written by PEFT's save_pretrained.",
        ) from error
    method = _method(kind, config)
    names = {theirs: ours for ours, theirs in _LAYERS[method][1].items()}
    tensors = {}
    for name, tensor in adapter.read_tensors(folder / WEIGHTS).items():
        module, theirs = _split(name.removeprefix(_PREFIX), names)
        plain = tensor.flatten() if theirs == "lora_E" else tensor
        tensors[f"{module}.{names[theirs]}" if theirs else module] = plain.float()
    labels = None
    parts = _anatomy(model, task, labels)
    modules = {
        name.removesuffix(f".{ours}") for name in tensors for ours in names.values() if name.endswith(f".{ours}")
    }
    options = _options(method, config, parts, modules)
    card = adapter.card(base.create(method, options), model=model, task=task, precision="fp32", labels=labels, seed=0)
    with atomic_directory(target) as made:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made / adapter.TENSORS)
        write_json(made / adapter.CARD, asdict(card))


def _split(name: str, endings: Mapping[str, str]) -> tuple[str, str]:
    """A tensor's module and which of ``endings`` its name has; the name itself and nothing if none."""
    ending = next((each for each in endings if name.endswith(f".{each}")), "")
    return (name.removesuffix(f".{ending}"), ending) if ending else (name, "")


def _shaped(tensor: Tensor, theirs: str) -> Tensor:
    return tensor[:, None] if theirs == "lora_E" else tensor


def _settings(card: Card) -> dict[str, Any]:
    """PEFT's names of a method's options."""
    options = card.options
    if card.method == "ln_tuning":
        return {}
    found = {"r": options["rank"], "lora_alpha": options["alpha"], "lora_dropout": options.get("dropout", 0.0)}
    if card.method == "adalora":  # PEFT scales by alpha over the rank that is left, which it stores nowhere; r is there
        return found | {"init_r": options["rank"], "target_r": options["budget"], "total_step": 1}
    return found | {"use_dora": card.method == "dora", "use_rslora": options.get("rank_stabilised", False)}


def _method(kind: str, config: Mapping[str, Any]) -> str:
    if kind == "LORA":
        return "dora" if config.get("use_dora") else "lora"
    for method, (theirs, _) in _LAYERS.items():
        if theirs == kind:
            return method
    raise UsageError(
        f"A PEFT adapter of kind {kind} cannot be read.",
        "edgepeft has no such method, or does not translate its format.",
        f"These can be read: {', '.join(dict.fromkeys(theirs for theirs, _ in _LAYERS.values()))}.",
    )


def _options(method: str, config: Mapping[str, Any], parts: Anatomy, modules: set[str]) -> dict[str, Any]:
    if method == "ln_tuning":
        return {}
    roles = tuple(role for role in ROLES if set(parts.linears([role])) & modules)
    extra, missing = modules - set(parts.linears(roles)), set(parts.linears(roles)) - modules
    if extra or missing or config.get("rank_pattern") and method != "adalora" or config.get("alpha_pattern"):
        example = f", such as {sorted(extra | missing)[0]}" if extra | missing else ""
        raise UsageError(
            "This PEFT adapter does not change all layers of a role in the same way.",
            f"edgepeft's {method} has one rank and whole roles; {len(extra | missing)} layers differ{example}.",
            "Merge it with PEFT, and give edgepeft the merged model.",
        )
    found: dict[str, Any] = {"alpha": float(config["lora_alpha"]), "targets": roles}
    if method == "adalora":
        return found | {"rank": config["init_r"], "budget": config["target_r"]}
    found |= {"rank": config["r"], "dropout": float(config.get("lora_dropout") or 0.0)}
    return found | ({"rank_stabilised": bool(config.get("use_rslora"))} if method == "lora" else {})


def _anatomy(model: str, task: str, labels: tuple[str, ...] | None) -> Anatomy:
    with torch.device("meta"):
        configuration = backbone.config(backbone.resolve(model))
        return backbone.skeleton(configuration, task=task, at="fp32", labels=len(labels or ()) or 2).anatomy
