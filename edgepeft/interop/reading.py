"""An adapter in PEFT's format, written as one of edgepeft's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from edgepeft import adapter, backbone, peft_config, tasks
from edgepeft.anatomy import ROLES
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError, said
from edgepeft.files import atomic_directory, write_json
from edgepeft.interop import folder as folders
from edgepeft.interop import settings, structure
from edgepeft.interop.form import Form, Layers, Read, Tensors, grouped
from edgepeft.methods import base


def read(folder: Path, target: Path, model: str | None = None) -> tuple[str, ...]:
    """Write the PEFT adapter in ``folder`` as one of edgepeft's.

    Args:
        model: the backbone, where it is not where the adapter says.

    Returns:
        What a user of the new folder should know.

    Raises:
        UsageError: it is of a kind, or has a setting, that edgepeft does not translate.
        EdgePeftError: a file is missing or damaged, or the adapter is none of the backbone.
    """
    config = _config(folder / peft_config.FILE)
    name = _method(config)
    form = folders.FORMS[name]
    settings.check(config, (*form.understood, *(["revision"] if model else [])))
    model = model or config.get("base_model_name_or_path")
    if not model:
        raise UsageError(f"{folder} names no backbone.", "base_model_name_or_path is empty.", "Name it: --model MODEL.")
    stored = folders.tensors(folder / peft_config.WEIGHTS)
    given = {key.removeprefix(folders.prefix(form)): tensor.float() for key, tensor in stored.items()}
    task = _task(config, model)
    made = structure.of(model, task, given)
    heads = _heads(given, made)
    own = {key: tensor for key, tensor in given.items() if key not in heads}
    layers = _layers(own, form, made)
    try:
        found = form.read(config, own, made)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
        cause = f"It does not describe the tensors beside it: {said(error)}."
        raise folders.damaged(folder / peft_config.FILE, cause) from error
    options = found.options
    if "targets" in {field.name for field in dataclasses.fields(base.find(name))}:
        options = {**options, "targets": structure.roles(layers.keys(), made)}
    method = base.create(name, options)
    structure.complete(method, made)
    missing = _missing(found, form, made, name)
    tensors = {**found.tensors, **missing, **{key: given[key] for key in heads}}
    structure.check(made, tensors, heads, str(folder))
    before = adapter.read_card(folder) if (folder / adapter.CARD).exists() else None
    card = adapter.card(
        method,
        model=model,
        task=task,
        precision=before.precision if before else "fp32",
        labels=_labels(made, before.labels if before else None),
        seed=before.seed if before else 0,
    )
    with atomic_directory(target) as inside:
        folders.save(tensors, inside / adapter.TENSORS)
        write_json(inside / adapter.CARD, asdict(card))
    if not missing:
        return found.notes
    left = f"It leaves layers alone that {name} changes here, such as {structure.module(min(missing))}"
    return (*found.notes, f"{left}: there the change is nothing.")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise folders.damaged(path, f"It is missing or damaged: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise folders.damaged(path, "It names no peft_type.")
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(config.get(name, ""), str | None):
            raise folders.damaged(path, f"Its {name} is {config[name]!r}.")
    return config


def _method(config: Mapping[str, Any]) -> str:
    kind = config["peft_type"]
    if kind == "LORA":
        return "dora" if config.get("use_dora") else "lora"
    kinds = {theirs: method for method, form in folders.FORMS.items() for theirs in form.kinds}
    if kind not in kinds:
        raise UsageError(
            f"A PEFT adapter of kind {kind} cannot be read.",
            "edgepeft has no method that computes the same.",
            f"These can be read: {', '.join(kinds)}. {settings.REMEDY}",
        )
    return kinds[kind]


def _task(config: Mapping[str, Any], model: str) -> str:
    """The task that the adapter names; what its backbone is usually tuned for, if it names none."""
    named = config.get("task_type")
    if named is None:
        return tasks.default_task(backbone.config(backbone.resolve(model)))
    ours = {theirs: task for task, theirs in peft_config.TASKS.items()}
    if named not in ours:
        raise UsageError(
            f"A PEFT adapter for {named} cannot be read.",
            f"edgepeft's tasks are {', '.join(f'{task} ({theirs})' for theirs, task in ours.items())}.",
            "",
        )
    return ours[named]


def _heads(given: Tensors, made: Backbone) -> set[str]:
    """The parameters of the model itself among an adapter's tensors; only a head's can be kept."""
    whole = structure.whole(given, made, norms=False)
    if lost := sorted(name for name in whole if not structure.loadable(name, made)):
        raise UsageError(
            f"A PEFT adapter that trained {structure.module(lost[0])} as a whole cannot be read.",
            "Of modules_to_save, edgepeft's adapters hold the heads of classifiers alone.",
            settings.REMEDY,
        )
    return whole


def _layers(own: Tensors, form: Form, made: Backbone) -> Layers:
    """The layers that an adapter changes.

    Raises:
        UsageError: a tensor that the form does not know, or a layer that no role stands for.
    """
    layers, unknown = grouped(own, form.endings)
    known = {"", *made.anatomy.linears(ROLES), *made.anatomy.norms}
    outside = sorted(layers.keys() - known)
    if unknown or outside:
        raise UsageError(
            f"This PEFT adapter changes {outside[0] if outside else min(unknown)}, which edgepeft cannot.",
            f"{made.model.config.model_type} has no such tensor."
            if unknown
            else "It is neither a linear layer of an attention or a feed-forward, nor a norm.",
            f"Is the backbone the right one? --model names another. If it is: {settings.REMEDY}",
        )
    return layers


def _missing(found: Read, form: Form, made: Backbone, method: str) -> Tensors:
    """Tensors of layers that PEFT's adapter left alone, and the method changes because others of their role are."""
    plain = made.fresh
    absent = {
        key: tensor for key, tensor in base.state(made.model).items() if key not in found.tensors and key not in plain
    }
    if absent and form.neutral is None:
        raise UsageError(
            "This PEFT adapter does not change all layers of a role in the same way.",
            f"edgepeft's {method} changes {structure.module(min(absent))} too.",
            settings.REMEDY,
        )
    return {key: torch.full(tensor.shape, form.neutral or 0.0) for key, tensor in absent.items()}


def _labels(made: Backbone, known: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of the labels: those of the card that was beside the adapter, or the backbone's own."""
    if made.task != "classification":
        return None
    count = made.model.config.num_labels
    own = tuple(made.model.config.id2label[number] for number in range(count))
    return known if known is not None and len(known) == count else own
