"""A run folder for an adapter that was trained elsewhere, which merging, export and all that follows accept."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgepeft import adapter, interop
from edgepeft import recipe as recipes
from edgepeft.data import Data, task_of
from edgepeft.data.columns import needed
from edgepeft.data.recognise import Misfit
from edgepeft.errors import UsageError
from edgepeft.files import atomic_directory
from edgepeft.fingerprints import fingerprint
from edgepeft.methods import base
from edgepeft.peft_config import FILE, PREFIX
from edgepeft.recipe import Recipe
from edgepeft.workspace import BROUGHT, Workspace

MICROBATCH = 8  # of the evaluations that follow; nothing is trained
_OF = {"classification": "a classifier's", "causal-lm": "a language model's", "seq2seq": "a seq2seq model's"}


def begin(source: Path, out: Path, *, data: str, model: str | None = None) -> tuple[str, ...]:
    """Make the folder ``out`` a run whose training is over, with the adapter in ``source``, PEFT's or edgepeft's.

    Args:
        data: what the run's artefacts are held against each other on.
        model: the backbone of an adapter of PEFT's, where it is not where the adapter says.

    Returns:
        What a user of the new folder should know.

    Raises:
        UsageError: it is no adapter, or one that edgepeft cannot express, or the data is not there or of another task.
        EdgePeftError: it is damaged.
    """
    with atomic_directory(out) as folder:
        space = Workspace(folder)
        notes: tuple[str, ...] = ()
        if (source / FILE).exists() and not (source / adapter.TENSORS).exists():
            notes = interop.convert(source, space.adapter, model)
        else:
            if not (source / adapter.CARD).exists():
                recipes.check_trained(source)
            where = source / "adapter" if (source / "adapter").is_dir() else source
            adapter.read_card(where)
            interop.keep_backbone(where, model)
            shutil.copytree(where, space.adapter)
        card = adapter.read_card(space.adapter)
        if card.method.startswith(PREFIX):
            raise UsageError(
                f"The adapter in {source} was trained by PEFT's own layers.",
                "They are made again from its run's recipe, which names their configuration.",
                "Merge and export the run itself: edgepeft merge RUN, edgepeft export RUN.",
            )
        adapter.check_ours(card)
        adapter.check(space.adapter, base.create(card.method, card.options), card.model)
        _check_data(data, card.task)
        chosen = Recipe(
            model=card.model,
            data=data,
            task=card.task,
            method=card.method,
            options=card.options,
            precision=card.precision,
            microbatch=MICROBATCH,
            checkpointing=False,
            seed=card.seed,
        )
        recipes.write(chosen, space.recipe)
        space.finish(BROUGHT, fingerprint(space.adapter / adapter.TENSORS))
    return notes


def _check_data(data: str, task: str) -> None:
    """Refuse data of another task than the adapter's: its task is what it is, and no flag makes it another.

    Raises:
        UsageError: see above.
    """
    try:
        task_of(data, task=task)
    except Misfit as error:
        remedy = f"The adapter is {_OF[task]}; give data with {needed(task)}."
        raise UsageError(error.fact, error.cause, remedy) from error


def is_here(space: Workspace) -> bool:
    """Whether the adapter of a run is one that was trained elsewhere."""
    return space.done(BROUGHT, fingerprint(space.adapter / adapter.TENSORS))


def check_labels(space: Workspace, data: Data) -> str:
    """Refuse data whose classes are not the adapter's; what to say where the adapter does not name its own.

    Raises:
        UsageError: see above.
    """
    labels = adapter.read_card(space.adapter).labels
    if labels is None or tuple(labels) == data.labels:
        return ""
    shown = ", ".join(data.labels)
    if len(labels) == len(data.labels) and all(name == f"LABEL_{number}" for number, name in enumerate(labels)):
        return f"The adapter does not name its classes; they are taken to be {shown}, in this order."
    raise UsageError(
        f"The adapter's classes are {', '.join(labels)}, and the data's {shown}.",
        "A class is a number to the adapter: they must be the same ones, in the same (alphabetical) order.",
        "Name the labels in the data as the adapter does.",
    )
