"""Files to rows: one at a time, each with the place it came from, so that an error can point at it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edgepeft.errors import UsageError

Row = tuple[str, dict[str, Any]]
"""Where a row stands, e.g. ``train.jsonl, line 17``, and its values by column name."""

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file with one of :data:`SUFFIXES`, never more than a few in memory.

    Raises:
        UsageError: a row is malformed (the message has file and line), or the file cannot be read.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".csv": partial(_csv, separator=","),
        ".tsv": partial(_csv, separator="\t"),
        ".parquet": _parquet,
    }
    try:
        yield from readers[path.suffix.lower()](path)
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read.", error.strerror or "", "Check who may read the file.") from error


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if number == 1 and line.lstrip().startswith("["):
            raise UsageError(
                f"{path} is one JSON array.",
                "It is read line by line, so that it need not fit into memory.",
                _rewriting(path, "lines", _LINES),
            )
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _malformed(where, f"It is not a JSON object on one line: {error}.") from error
        if not isinstance(value, dict):
            raise _malformed(where, f"Expected one JSON object per line, found {_described(value)}.")
        if "\\u" in line and (half := _half(value)):
            raise _malformed(where, f"It has {half!r}, half of a character: the other half is missing.")
        yield where, value


def _csv(path: Path, separator: str) -> Iterator[Row]:
    number, head = next(((number, line) for number, line in _lines(path) if line.strip()), (1, ""))
    if separator not in head and (other := next((sign for sign in ",;\t|" if sign in head), None)):
        raise _separated(path, f"{path}, line {number}", other)
    # The csv module refuses fields above 128 KiB unless told otherwise; the limit is a setting of the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        # strict: an unclosed quote would otherwise swallow the rest of the file into one field without a word.
        reader = csv.reader((line for _, line in _lines(path)), delimiter=separator, strict=True)
        names: list[str] | None = None
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise _malformed(where, f"It is not {path.suffix[1:].upper()}: {error}.") from error
            if values is None:
                return
            if not values:
                continue
            if names is None:
                names = values
                if len(set(names)) < len(names) or "" in names:
                    raise _malformed(where, f"The header must name every column once; it is {names}.")
                continue
            if len(values) != len(names):
                raise _malformed(where, f"It has {len(values)} fields; the header names {len(names)}.")
            yield where, dict(zip(names, values, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            classes = _classes(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", named(value, classes)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{path} cannot be read after row {number}.",
            f"It is not a whole parquet file: {error}.",
            "Write or fetch the file again.",
        ) from error


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of each column of class numbers, in their order, which ``datasets`` keeps beside a table."""
    kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = kept.get("info", {}).get("features", {}).items()
    plain = ((column, kind) for column, kind in features if isinstance(kind, dict))  # a list of structures is a list
    return {column: kind["names"] for column, kind in plain if kind.get("_type") == "ClassLabel"}


def named(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names of its classes in place of their numbers; -1 stands for none."""
    for column, names in classes.items():
        number = row[column]
        row[column] = names[number] if number is not None and 0 <= number < len(names) else None
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines with their line ends, decoded one by one so that bad bytes have a line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path}, line {number}: the text cannot be read.",
                    f"It is not UTF-8: {error.reason}.",
                    "Save the file as UTF-8.",
                ) from error


def _separated(path: Path, where: str, sign: str) -> UsageError:
    """Columns stand apart by another sign than the file's name says."""
    suffix = {",": ".csv", "\t": ".tsv"}.get(sign)
    return UsageError(
        f"{where}: the columns are separated by {sign!r}.",
        "A .csv is read with commas, a .tsv with tabs.",
        f"Rename it to {path.with_suffix(suffix)}" if suffix else _rewriting(path, "commas", _COMMAS.format(sign=sign)),
    )


_LINES = (
    'import json, sys; sys.stdin.reconfigure(encoding="utf-8-sig"); '
    "[print(json.dumps(row)) for row in json.load(sys.stdin)]"
)
_COMMAS = (
    'import csv, sys; sys.stdin.reconfigure(encoding="utf-8-sig", newline=""); '
    'csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter="{sign}"))'
)


def _rewriting(path: Path, what: str, script: str) -> str:
    """A remedy: a command that writes a file anew, with ``what`` in it, under a name no folder is searched for."""
    files = f"< {quote(str(path))} > {quote(str(path.with_name(f'{what}-{path.name}')))}"
    return f"Write it with {what}, and use the new file in its place:\npython -c {quote(script)} {files}"


def _half(value: Any) -> str:
    """A surrogate in any text of a JSON value that is not one of a pair, as only an escape can write it; else ''."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return ""


def _malformed(where: str, cause: str) -> UsageError:
    return UsageError(f"{where}: the row is malformed.", cause, "Correct the row or delete it.")


def _described(value: Any) -> str:
    kinds = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return kinds.get(type(value), "null")
