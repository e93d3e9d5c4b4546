"""From what the user named to two splits on disk, built once and found again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from edgepeft.chat import PLAIN
from edgepeft.data.columns import Layout
from edgepeft.data.encode import Encoder
from edgepeft.data.partition import asked, check_alike, check_classes, check_labels, classes_of, partition
from edgepeft.data.recognise import recognise
from edgepeft.data.source import Source, sources
from edgepeft.data.split import Split
from edgepeft.data.store import quietly, write_encoded, write_rows
from edgepeft.data.template import extract
from edgepeft.data.tokens import check, fingerprint, pad_id
from edgepeft.errors import UsageError
from edgepeft.files import atomic_directory, write_json

FORMAT = 2
"""Raised when the same data would be stored differently, so that older caches are not mistaken for it."""


@dataclass(frozen=True)
class Data:
    """What training needs to know of its data. ``labels[i]`` is the name of class ``i``; other tasks have none.

    ``repeated`` counts the validation examples whose input is also one of the training data.
    """

    task: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    template: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    repeated: int = 0

    def described(self, max_tokens: int | None) -> str:
        """How many examples there are, how many were cut at ``max_tokens`` or left out, and are in both parts."""
        parts = (("train", self.train), ("validation", self.validation))
        cut = ", ".join(f"{part.truncated} of {name} cut at {max_tokens} tokens" for name, part in parts)
        lost = " and ".join(f"{part.dropped} of {name}" for name, part in parts if part.dropped)
        lost = f"; {lost} left out, as no token was left to learn" if lost else ""
        both = f"; {self.repeated} of validation have their input in the training data too" if self.repeated else ""
        return f"{len(self.train)} to train on, {len(self.validation)} to validate; {cut}{lost}{both}"


def task_of(
    source: str, *, task: str | None = None, columns: Mapping[str, str] | None = None, validation: str | None = None
) -> str:
    """The task of a data set, from its first row alone; the arguments are those of ``load``.

    Raises:
        UsageError: the data cannot be used for any task, or for the one that was asked for.
    """
    return _opened(source, validation, task, columns)[2].task


def load(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    validation: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    max_tokens: int,
    max_target_tokens: int = 128,
) -> Data:
    """Read, check, split and tokenise a data set, or find it under ``cache`` if that was done before.

    Neither step holds the data in memory. The columns decide the task: ``text`` + ``label``, ``prompt`` +
    ``completion``, ``input`` + ``target``, ``messages``, or ``text`` alone with ``task="causal-lm"``.

    Args:
        source: a .jsonl, .json (lines), .csv, .tsv or .parquet file, a folder with ``train.*`` and perhaps
            ``validation.*``, or a hub data set ``name`` or ``name:config``.
        columns: ``{field: column}`` for columns with other names, e.g. ``{"text": "review"}``.
        validation: where the validation examples are; if the source has none, ``validation_fraction`` of the training
            examples is set aside, chosen by ``seed`` alone, examples of equal inputs together.
        max_tokens: longest input, or for causal-lm longest prompt and answer together.
        max_target_tokens: longest seq2seq target.

    Raises:
        UsageError: the data cannot be used as it is; the message names file, row and column.
        EdgePeftError: the chat template cannot be carried to the device, or the disk is full.
    """
    training, validating, layout = _opened(source, validation, task, columns)
    check(tokenizer, layout.task, max_tokens, max_target_tokens, validation_fraction)
    settings = {
        "format": FORMAT,
        "train": training.key,
        "validation": validating.key if validating else [validation_fraction, seed],
        "layout": [layout.task, layout.fields, layout.columns],
        "tokens": [max_tokens, max_target_tokens],
        "tokenizer": fingerprint(tokenizer),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    home = cache / f"data-{key}"
    if not home.is_dir():
        template = extract(tokenizer) if "messages" in layout.fields else dict(PLAIN)
        with atomic_directory(home) as folder, quietly():
            parts, labels, repeated = _parts(folder / "rows", layout, training, validating, validation_fraction, seed)
            encoder = Encoder(
                layout=layout,
                tokenizer=tokenizer,
                template=template,
                labels=labels,
                max_tokens=max_tokens,
                max_target_tokens=max_target_tokens,
            )
            dropped = {split: write_encoded(rows, encoder, folder / f"{split}.arrow") for split, rows in parts.items()}
            said = {"labels": labels, "template": template, "dropped": dropped, "repeated": repeated}
            write_json(folder / "data.json", said)
            shutil.rmtree(folder / "rows")
    known = json.loads((home / "data.json").read_text(encoding="utf-8"))
    train, held_out = (
        Split(layout.task, home / f"{split}.arrow", dropped=known["dropped"][split], pad_id=pad_id(tokenizer))
        for split in ("train", "validation")
    )
    labels = tuple(known["labels"])
    return Data(layout.task, labels, train, held_out, known["template"], tokenizer, known["repeated"])


def _opened(
    source: str, validation: str | None, task: str | None, columns: Mapping[str, str] | None
) -> tuple[Source, Source | None, Layout]:
    training, validating = sources(source, validation)
    _, first = training.first()
    return training, validating, recognise(training.name, first, task=task, columns=columns or {})


def _parts(
    folder: Path, layout: Layout, training: Source, validating: Source | None, fraction: float, seed: int
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...], int]:
    """The rows of both splits, memory-mapped from files below ``folder``, the names of the classes, and how many
    inputs of the validation data are in the training data too."""
    rows = write_rows(training, layout, folder / "train")
    classes = classes_of(rows) if layout.task == "classification" else None
    if classes and len(classes.names) < 2:
        raise UsageError(
            f"{training.name} has only the label {classes.names[0]!r}.",
            "A classifier learns to tell at least two apart.",
            "Add examples with other labels.",
        )
    if classes:
        check_alike(rows, classes.names)
        others = [column for column in training.first()[1] if column not in layout.columns]
        label = layout.columns[layout.fields.index("label")]
        check_classes(training.name, label, classes, others, apart=validating is not None)
    names, inputs = classes.names if classes else (), asked(rows)
    if validating is None:
        codes = classes.codes if classes else None
        train, held_out = partition(len(rows), fraction, seed=seed, codes=codes, inputs=inputs)
        parts = {"train": train, "validation": held_out}
        return {split: rows.select(part, new_fingerprint=split) for split, part in parts.items()}, names, 0
    validating.first()
    validation = write_rows(validating, layout, folder / "validation")
    if layout.task == "classification":
        check_labels(validation, names)
    return {"train": rows, "validation": validation}, names, int(np.isin(asked(validation), inputs).sum())
