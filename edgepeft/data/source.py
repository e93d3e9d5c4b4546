"""What the user named (a file, a folder, a hub data set) as rows to train on and perhaps rows to validate on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

import datasets

from edgepeft.data.read import SUFFIXES, Row, named, rows
from edgepeft.errors import UsageError, beside


@dataclass(frozen=True)
class Source:
    """Rows that can be read again. ``key`` changes when they may have changed."""

    name: str
    key: tuple[Any, ...]
    read: Callable[[], Iterator[Row]]

    def first(self) -> Row:
        """The first row.

        Raises:
            UsageError: there is none.
        """
        for row in self.read():
            return row
        raise UsageError(f"{self.name} holds no data.", "There is not a single row in it.", "Check the file.")


def sources(source: str, validation: str | None) -> tuple[Source, Source | None]:
    """The rows named by ``source``, and those to validate on if there are any.

    Args:
        source: a file, a folder with ``train.*`` (and perhaps ``validation.*``), or a hub data set ``name`` or
            ``name:config``.
        validation: the same for validation: a file, or a folder or hub data set that has a validation split.

    Raises:
        UsageError: nothing of that name, an unknown kind of file, or no split of that kind.
    """
    found = _splits(source)
    if validation is None:
        if "validation" not in found:
            _check_others(Path(source))
        return found["train"], found.get("validation")
    other = _splits(validation)
    if Path(validation).is_file():
        return found["train"], other["train"]
    if "validation" not in other:
        raise UsageError(
            f"{validation} has no validation split.",
            f"It has {', '.join(other)}.",
            "Name a file to validate on, --set validation=FILE, or none: a share of the training data is then kept.",
        )
    return found["train"], other["validation"]


def _splits(source: str) -> dict[str, Source]:
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"{path} is not a data file edgepeft can read.",
                f"Its name ends in {path.suffix or 'nothing'}; known are {', '.join(SUFFIXES)}.",
                "Convert it, for instance to one JSON object per line in a file named .jsonl.",
            )
        return {"train": _files(str(path), [path])}
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", source) or path.suffix.lower() in SUFFIXES:
        raise UsageError(f"There is no file or folder {source}.", "", _meant(source) or "Check the path.")
    return _hub(source)


def _meant(source: str) -> str:
    close = difflib.get_close_matches(source, beside(source), n=3)
    return f"Did you mean {', '.join(close)}?" if close else ""


def _files(name: str, paths: list[Path]) -> Source:
    states = [(path, path.stat()) for path in paths]
    key = tuple((str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states)
    return Source(name, key, lambda: chain.from_iterable(rows(path) for path in paths))


def _folder(folder: Path) -> dict[str, Source]:
    """The splits of a folder: ``train.jsonl``, ``validation.csv``, ``train-00000-of-00002.parquet`` and the like."""
    splits = {}
    for split in ("train", "validation"):
        paths = sorted(p for p in folder.glob(f"{split}[.-]*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if paths:
            _check_parts(folder, split, paths)
            splits[split] = _files(str(folder), paths)
    if "train" not in splits:
        _check_saved(folder)
        raise UsageError(
            f"{folder} has no training data.",
            f"It should hold a file train with one of the endings {', '.join(SUFFIXES)}.",
            "Rename the file, or name it instead of the folder.",
        )
    return splits


_ALSO_VALIDATION = ("valid", "val", "dev")


def _check_others(folder: Path) -> None:
    """Refuse a folder whose validation data goes by another name: training data would be kept back in its place."""
    other = next(
        (path for name in _ALSO_VALIDATION for path in sorted(folder.glob(f"{name}.*")) if path.suffix in SUFFIXES),
        None,
    )
    if other is not None:
        raise UsageError(
            f"{folder} has no file validation, but {other.name}.",
            "It would not be read, and a share of the training data be validated on.",
            f"Name it: --set validation={quote(str(other))}. Or name the file to train on instead of the folder.",
        )


def _check_saved(folder: Path) -> None:
    """Refuse what ``save_to_disk`` of the library datasets wrote: files for itself alone to read."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return
    made = quote(str(folder.with_name(f"{folder.name}-parquet")))
    raise UsageError(
        f"{folder} was written by save_to_disk of datasets.",
        "Its files are for that library alone to read.",
        f"Write it as parquet, and name the new folder instead:\npython -c {quote(_SAVED)} {quote(str(folder))} {made}",
    )


_SAVED = (
    "import datasets, os, sys; old, new = sys.argv[1:]; os.makedirs(new); read = datasets.load_from_disk(old); "
    '[part.to_parquet(f"{new}/{name}.parquet") for name, part in '
    '(read if isinstance(read, dict) else {"train": read}).items()]'
)


def _check_parts(folder: Path, split: str, paths: list[Path]) -> None:
    """Refuse several files that are not the parts of one set, by their names: a copy would be learned twice."""
    parts = [re.fullmatch(rf"{split}-(\d+)-of-(\d+)(-[0-9a-f]+)?", path.stem) for path in paths]
    numbers, totals = ({part and int(part[group]) for part in parts} for group in (1, 2))
    if len(paths) == 1 or (None not in numbers and len(numbers) == len(paths) and len(totals) == 1):
        return
    names = ", ".join(path.name for path in paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    raise UsageError(
        f"{folder} has more than one {split} file: {names}.",
        "If one is a copy of another, its examples would be counted twice.",
        f"Keep one of them there, or name a file instead of the folder. Parts of one set are {split}-00000-of-00002 "
        f"and {split}-00001-of-00002.",
    )


def _hub(source: str) -> dict[str, Source]:
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client raises many unrelated types: network, parsing, permission, missing
        raise UsageError(
            f"The data set {source} could not be loaded.",
            f"There is no file or folder of that name here, and the hub says: {error}",
            _meant(source) or "Check the name and the network, or give a local file (.jsonl, .csv, .tsv, .parquet).",
        ) from error
    if "train" not in loaded:
        raise UsageError(
            f"The data set {source} has no train split.", f"It has {', '.join(loaded)}.", "Choose another."
        )
    return {
        split: Source(
            f"{source} ({split})", (source, split, loaded[split]._fingerprint), partial(_named, source, loaded[split])
        )
        for split in ("train", "validation")
        if split in loaded
    }


def _named(source: str, table: datasets.Dataset) -> Iterator[Row]:
    """Rows of a hub data set, its class numbers replaced by their names."""
    classes = {name: kind.names for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(table, 1):
        yield f"{source} ({table.split}), row {number}", named(row, classes)
