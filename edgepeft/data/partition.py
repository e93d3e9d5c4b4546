"""Which examples are trained on and which are held out, and the classes among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from edgepeft.data.batches import Numbers
from edgepeft.errors import UsageError, nearest

FEW = 10
"""Rows below which a label that occurs once is no sign that labels are no classes."""


@dataclass(frozen=True)
class Classes:
    """The labels of a data set: ``names`` in the order of their class numbers, and a code per example."""

    names: tuple[str, ...]
    codes: Numbers


def classes_of(rows: datasets.Dataset) -> Classes:
    """The distinct labels, sorted (as numbers if all are), and codes ``(examples,)``, equal for equal labels."""
    column = rows.data.table["label"].dictionary_encode().unify_dictionaries()
    labels: list[str] = column.chunk(0).dictionary.to_pylist()
    try:
        names = sorted(labels, key=int)
    except ValueError:
        names = sorted(labels)
    return Classes(tuple(names), np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks]).astype(np.int64))


def check_labels(validation: datasets.Dataset, names: tuple[str, ...]) -> None:
    """Refuse a validation set with a label that training never sees.

    Raises:
        UsageError: names the label and its first row.
    """
    found = validation.data.table["label"]
    for label in pc.unique(found).to_pylist():
        if label not in names:
            first = pc.index(found, label).as_py()
            raise UsageError(
                f"{validation[first]['where']}: the label {label!r} is in the validation data only.",
                "A model cannot learn a class it never sees.",
                nearest(label, names),
            )


def check_alike(rows: datasets.Dataset, names: Sequence[str]) -> None:
    """Refuse labels that differ in the white space around them alone: nobody means two classes that look the same.

    Raises:
        UsageError: names the label and its first row.
    """
    plain: dict[str, str] = {}
    for name in names:
        other = plain.setdefault(name.strip(), name)
        if other != name:
            like, odd = sorted((other, name), key=len)
            first = pc.index(rows.data.table["label"], odd).as_py()
            raise UsageError(
                f"{rows[first]['where']}: the label {odd!r} differs from {like!r} in white space alone.",
                "Each would be a class.",
                "Write both alike.",
            )


def check_classes(name: str, label: str, classes: Classes, others: Sequence[str], *, apart: bool) -> None:
    """Refuse labels that are no classes, since most rows have one of their own: numbers to predict, or other text.

    A few rows are let be: it may be rows that are missing. So are classes of one example each where there is other
    data to validate on, unless they are fractions.

    Args:
        name: of the data.
        label: the column, and ``others`` those that are not used.
        apart: whether validation has data of its own.

    Raises:
        UsageError: see above.
    """
    rows, singles = len(classes.codes), int(np.count_nonzero(np.bincount(classes.codes) == 1))
    if rows < FEW or 2 * singles <= rows or (apart and not _fractions(classes.names)):
        return
    each = "Each" if singles == rows else f"{singles} of them"
    remedy = "If it is a number to predict: that is not supported; labels such as low and high are."
    if others:
        remedy += f" If it is the wrong column: --set columns.label=NAME, where NAME is one of {', '.join(others)}"
    raise UsageError(
        f"{name}: {label!r} has {len(classes.names)} different values in {rows} rows.",
        f"{each} would be a class that is seen once.",
        remedy,
    )


def _fractions(names: Sequence[str]) -> bool:
    try:
        return any(not float(name).is_integer() for name in names)
    except (ValueError, OverflowError):
        return False


def asked(rows: datasets.Dataset) -> Numbers:
    """A number per example, ``(examples,)``, equal for equal inputs: all that a model reads before it answers."""
    field = next(name for name in ("text", "prompt", "input", "messages") if name in rows.column_names)
    table = rows.data.table[field]
    numbers = np.empty(len(table), np.int64)
    for number, content in enumerate(value for chunk in table.chunks for value in chunk.to_pylist()):
        if field == "messages":
            answer = max(i for i, message in enumerate(content) if message["role"] == "assistant")
            content = json.dumps([[message["role"], message["content"]] for message in content[:answer]])
        # of 8 bytes instead of the texts themselves, which need not fit into memory
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        numbers[number] = int.from_bytes(digest, "little", signed=True)
    return numbers


def partition(
    examples: int, fraction: float, *, seed: int, codes: Numbers | None = None, inputs: Numbers | None = None
) -> tuple[Numbers, Numbers]:
    """Indices to train on and to hold out, each in ascending order, at least one of both.

    The choice depends on the arguments alone, on every platform (``RandomState``, NEP 19). With ``codes``, held-out
    examples of a class that would otherwise not be trained on are trained on instead. With ``inputs``, examples of
    equal ones stay together, unless all are equal: a text that is trained on says nothing of how well others do.

    Raises:
        UsageError: too few examples.
    """
    count = min(max(1, round(examples * fraction)), examples - 1)
    order = np.random.RandomState(seed).permutation(examples).astype(np.int64)
    groups = np.arange(examples) if inputs is None else np.unique(inputs, return_inverse=True)[1]
    groups = np.arange(examples) if examples and not groups.any() else groups
    chosen = _chosen(groups[order], count)
    held_out, train = order[chosen], order[~chosen]
    if codes is not None:
        unseen = np.isin(groups[held_out], groups[held_out[~np.isin(codes[held_out], codes[train])]])
        held_out, train = held_out[~unseen], np.concatenate([train, held_out[unseen]])
    if len(held_out) == 0:
        raise UsageError(
            f"With {examples} examples there is none to validate on.",
            "Each is needed for training." if examples > 1 else "One example cannot be both.",
            "Add examples, or name a file with others to validate on: --set validation=FILE",
        )
    return np.sort(train), np.sort(held_out)


def _chosen(groups: Numbers, count: int) -> NDArray[np.bool_]:
    """Which of the examples, whose ``groups`` are given in random order, are the first ``count`` in whole groups.

    A group that is too large for what is left is passed over; if all are, the smallest is chosen.
    """
    _, first, where, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    taken, left = np.zeros(len(sizes), bool), count
    appearing = np.argsort(first, kind="stable")
    for group in appearing:
        if sizes[group] <= left:
            taken[group], left = True, left - sizes[group]
        if left == 0:
            break
    if not taken.any() and count:
        taken[min(appearing, key=sizes.__getitem__)] = True
    return taken[where]
