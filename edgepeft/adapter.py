"""Adapters on disk: what was trained and nothing else, in safetensors, with what is needed to put it back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgepeft import __version__, foreign, shards
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import atomic_directory, write_json
from edgepeft.methods import base
from edgepeft.methods.base import Method, state
from edgepeft.placements import stored
from edgepeft.placements.selection import canonical
from edgepeft.placements.stored import CARD as CARD
from edgepeft.placements.stored import TENSORS as TENSORS
from edgepeft.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an adapter belongs to (adapter.json)."""

    method: str
    version: int = 1
    """Of the method, see ``methods.base.Method``."""

    options: dict[str, Any]
    model: str
    weights: str = ""
    """A fingerprint of the backbone's weights, where they were in a folder."""

    task: str
    precision: str
    labels: tuple[str, ...] | None
    seed: int
    edgepeft: str = __version__


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by a name that does not depend on the precision of the backbone."""
    return {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}


def card(method: Method, *, model: str, task: str, precision: str, labels: tuple[str, ...] | None, seed: int) -> Card:
    """The card of an adapter of ``method``."""
    return Card(
        method=method.name,
        version=method.version,
        options=asdict(method),
        model=model,
        weights=stored.weights(model),
        task=task,
        precision=precision,
        labels=labels,
        seed=seed,
    )


def save(directory: Path, model: nn.Module, what: Card, ranks: Ranks = ALONE) -> None:
    """Write the adapter of ``model`` as a folder, whole or not at all; the first of several ranks does."""
    tensors = shards.collected(state(model), ranks)
    if not ranks.first:
        return
    with atomic_directory(directory) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        write_json(folder / CARD, asdict(what))
        if foreign.is_in(model):
            foreign.write(folder, model, what.model)


def read_card(directory: Path) -> Card:
    """What the adapter in ``directory`` belongs to.

    Raises:
        UsageError: there is no adapter, or it is of a version that writes what this one does not know.
        EdgePeftError: the card is damaged.
    """
    path = directory / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no adapter in {directory}.", f"{CARD} is missing.", "Train one first.") from error
    except ValueError as error:
        raise EdgePeftError(f"{path} is damaged.", str(error), _next_step(directory)) from error
    if wrong := _wrong(values):
        raise EdgePeftError(f"{path} is damaged.", wrong, _next_step(directory))
    if unknown := sorted(values.keys() - _CARD.keys()):
        raise UsageError(
            f"The adapter in {directory} is of another version.",
            f"Its {CARD} has {unknown[0]!r}, which edgepeft {__version__} does not know; it was written by edgepeft "
            f"{values.get('edgepeft')}.",
            "Use that version, or train again with this one.",
        )
    labels = values.pop("labels")
    return Card(labels=None if labels is None else tuple(labels), **values)


def check_ours(card: Card) -> None:
    """Refuse an adapter of a method from elsewhere, before the method is looked for: a dotted path is a module to run.

    For adapters that come without a recipe; a run's own names what its user chose.

    Raises:
        UsageError: see above.
    """
    if card.method in base.names():
        return
    raise UsageError(
        f"The adapter's method, {card.method!r}, does not come with edgepeft.",
        f"To use it would be to run code because a file that came with the adapter, {CARD}, names it.",
        "`edgepeft methods` lists those that come with edgepeft. If the method is your own, merge and export the run "
        "that trained the adapter: edgepeft merge RUN, edgepeft export RUN.",
    )


_LATER = ("edgepeft", "version", "weights")  # not in the first cards

# What the card's entries are in JSON.
_CARD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "model", "weights", "task", "precision", "edgepeft"), (str,)),
    "version": (int,),
    "options": (dict,),
    "labels": (list, type(None)),
    "seed": (int,),
}


def _wrong(values: Any) -> str:
    """Why a card is none, if it is none."""
    if not isinstance(values, dict):
        return "It is no JSON object."
    for name, kinds in _CARD.items():
        if name not in values and name not in _LATER:
            return f"It has no {name!r}."
        if name in values and not isinstance(values[name], kinds):
            return f"Its {name!r} is {values[name]!r}."
    return ""


def check(directory: Path, method: Method, model: str | None) -> None:
    """Refuse an adapter of another backbone, of another method, or of another version of the method.

    An option that the adapter's version did not have yet must have its default.

    Args:
        model: what the backbone is called; None where it is known to be the adapter's own.

    Raises:
        UsageError: see above.
    """
    card = read_card(directory)
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(method)))
    given = {
        **{field.name: field.default for field in fields(method) if field.name not in card.options},
        **card.options,
    }
    differing = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != _plain(given.get(name)))
    remedy = f"Its {CARD} says what it belongs to: put that into recipe.toml, or train again in another folder."
    if model is not None and (other := stored.other_backbone(asdict(card), model)):
        cause = other
    elif card.method != method.name:
        cause = f"It is one of {card.method}, and this is {method.name}."
    elif card.version != method.version:
        cause = (
            f"It is of version {card.version} of {method.name}, by edgepeft {card.edgepeft}, and this is version "
            f"{method.version}, which would compute something else with it."
        )
        use = f"Use edgepeft {card.edgepeft} for it, or train" if card.edgepeft != __version__ else "Train"
        remedy = f"{use} again in another folder."
    elif differing:
        name = differing[0]
        here = f"here it is {wanted[name]!r}" if name in wanted else f"this {method.name} has no such option"
        cause = f"It was trained with {name} = {given[name]!r}, by edgepeft {card.edgepeft}, and {here}."
    else:
        return
    raise UsageError(f"The adapter in {directory} does not belong to this run.", cause, remedy)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def load(directory: Path, model: nn.Module) -> None:
    """Put a saved adapter into a model that its method was injected into.

    Raises:
        EdgePeftError: the file is damaged.
        UsageError: it belongs to another backbone or method; all differences are named.
    """
    copy_into(state(model), read_tensors(directory / TENSORS), str(directory))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        EdgePeftError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise EdgePeftError(
            f"{path} cannot be read.",
            f"It is missing or damaged: {error}.",
            _next_step(path.parent),
        ) from error


def _next_step(folder: Path) -> str:
    """What helps where an adapter in ``folder`` is damaged: a run makes it again from its checkpoints."""
    if folder.parent.name == "checkpoints":
        return f"Delete the folder {folder.parent} and run the same command again; it trains anew."
    run = folder.parent
    if any((run / "checkpoints").glob("step-*")):
        return f"Delete the folder {folder} and run `edgepeft train --out {run}`; it goes on from the last checkpoint."
    return "Put it back from a copy, or train again in another folder."


def copy_into(parameters: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    """Copy ``tensors`` into ``parameters`` of the same names.

    Raises:
        UsageError: names or shapes differ.
    """
    missing = sorted(parameters.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - parameters.keys())
    shapes = sorted(
        name
        for name in parameters.keys() & tensors.keys()
        if tuple(parameters[name].shape) != tuple(tensors[name].shape)
    )
    if missing or unknown or shapes:
        problems = (("missing", missing), ("not in the model", unknown), ("of another shape", shapes))
        raise UsageError(
            f"The adapter in {where} does not belong to this model.",
            "; ".join(f"{len(names)} tensors {what}, such as {names[0]}" for what, names in problems if names) + ".",
            "Load it onto the backbone and with the method it was trained with; its adapter.json names them.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shards.part_of(tensors[name], parameter))
