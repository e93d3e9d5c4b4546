"""Which examples are trained on and which are held out, and the classes among them."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc

from edgepeft.data.batches import Numbers
from edgepeft.errors import UsageError, nearest


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


def partition(examples: int, fraction: float, *, seed: int, codes: Numbers | None = None) -> tuple[Numbers, Numbers]:
    """Indices to train on and to hold out, each in ascending order, at least one of both.

    The choice depends on the arguments alone, on every platform (``RandomState``, NEP 19). With ``codes``, held-out
    examples of a class that would otherwise not be trained on are trained on instead.

    Raises:
        UsageError: too few examples.
    """
    count = min(max(1, round(examples * fraction)), examples - 1)
    order = np.random.RandomState(seed).permutation(examples).astype(np.int64)
    held_out, train = order[:count], order[count:]
    if codes is not None:
        unseen = ~np.isin(codes[held_out], codes[train])
        held_out, train = held_out[~unseen], np.concatenate([train, held_out[unseen]])
    if len(held_out) == 0:
        raise UsageError(
            f"With {examples} examples there is none to validate on.",
            "Each is needed for training." if examples > 1 else "One example cannot be both.",
            "Add examples, or name a file with others to validate on.",
        )
    return np.sort(train), np.sort(held_out)
