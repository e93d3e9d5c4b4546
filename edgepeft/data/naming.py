"""Which flags would say what the columns of a data set are: advice for data that fits no task as it is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from edgepeft.data.columns import LAYOUTS, TEXT_ONLY, Layout

# What fields are often called elsewhere.
_ALSO = {
    "text": ("review", "sentence", "comment", "content", "body", "tweet"),
    "label": ("class", "category", "sentiment", "intent", "topic", "rating", "stars"),
    "prompt": ("question", "query", "instruction", "problem"),
    "completion": ("answer", "response", "output", "reply", "solution"),
    "input": ("source", "article", "document"),
    "target": ("summary", "translation"),
    "messages": ("conversation", "conversations", "chat", "dialogue"),
}


def flags(chosen: Mapping[str, str]) -> str:
    """The flags that give each field its column."""
    return " ".join(f"--set {shlex.quote(f'columns.{field}={_toml(column)}')}" for field, column in chosen.items())


def advice(row: Mapping[str, Any], task: str | None, columns: Mapping[str, str]) -> str:
    """What to do about data that fits no task, or not the one that is wanted.

    Args:
        row: the first one: its keys are the columns.
        task: as the user gave it.
        columns: likewise.
    """
    layouts = [layout for layout in LAYOUTS if task in (None, layout.task)]
    if columns:
        return _missing(row, layouts, columns)
    ways = [(layout, chosen) for layout in layouts if (chosen := guess(row, layout))]
    # Where the names themselves say what the columns are, the other tasks are not worth telling of.
    known = [sum(_called(field, row) is not None for field in layout.fields) for layout, _ in ways]
    told = [
        f"{flags(chosen)} ({layout.task})"
        for (layout, chosen), count in zip(ways, known, strict=True)
        if count == max(known)
    ]
    texts = [column for column in _free(row) if _holds(row[column], "text")]
    if task in (None, TEXT_ONLY.task) and ("text" in row or (len(texts) == 1 and not told)):
        named = "" if "text" in row else f" {flags({'text': texts[0]})}"
        told.append(f"--task {TEXT_ONLY.task}{named} (language modelling: all of the text is learned)")
    if not told:
        return f"Add columns: {_accepted(layouts)}."
    return told[0].join(("Add ", ".")) if len(told) == 1 else "Add one of\n" + "\n".join(told)


def guess(row: Mapping[str, Any], layout: Layout, *, renaming: bool = False) -> dict[str, str]:
    """Columns of ``row`` that may be the fields of ``layout`` without a column of their name; {} if they are too few.

    Args:
        renaming: whether columns that are called like a field of another layout may be taken for one of this.
    """
    others = {field for each in LAYOUTS for field in each.fields}
    free = {column: row[column] for column in _free(row) if renaming or column not in others}
    wanted = [field for field in layout.fields if field not in row]
    chosen = {}
    for field in wanted:
        if (column := _called(field, free)) is not None:
            chosen[field] = column
            del free[column]
    for field in wanted:
        if field not in chosen:
            # A text is longer than its label; of other pairs, the question stands before the answer.
            sign = {"text": -1, "label": 1}.get(field, 0)
            fitting = [column for column in free if column not in layout.fields and _holds(free[column], field)]
            if not fitting:
                return {}
            chosen[field] = min(fitting, key=lambda column: sign * len(str(row[column])))
            del free[chosen[field]]
    return {field: chosen[field] for field in wanted}


def _missing(row: Mapping[str, Any], layouts: Sequence[Layout], columns: Mapping[str, str]) -> str:
    """What is still to be named where the user named some columns."""
    given = " and ".join(f"columns.{field}" for field in columns)
    given += " is given" if len(columns) == 1 else " are given"
    holding = [layout for layout in layouts if set(layout.fields) >= set(columns)]
    if not holding:
        return f"{given}; name the columns of one task and no others: {_accepted(layouts)}."
    free = {column: row[column] for column in _free(row) if column not in columns.values()}
    layout = min(holding, key=lambda layout: len(set(layout.fields) - columns.keys() - free.keys()))
    wanted = [field for field in layout.fields if field not in columns and field not in free]
    needs = f"{given}; {layout.task} also needs {' and '.join(wanted)}"
    if len(free) < len(wanted):
        alone = f", or learn all of the text: --task {TEXT_ONLY.task}" if [*columns] == ["text"] else ""
        return f"{needs}, and no other column is left: add it{alone}"
    if len(free) == len(wanted) == 1:
        return f"{needs}: {flags({wanted[0]: next(iter(free))})}"
    called = {field: _called(field, free) for field in wanted}
    told = flags({field: column or "NAME" for field, column in called.items()})
    return f"{needs}: {told}" + (f", where NAME is one of {', '.join(free)}" if None in called.values() else "")


def _free(row: Mapping[str, Any]) -> list[str]:
    """The columns that may mean something: all but those that count the rows."""
    return [column for column in row if column.lower() not in ("id", "idx", "index")]


def _called(field: str, row: Mapping[str, Any]) -> str | None:
    """The column whose name is that of a field but for case, or one it often has elsewhere."""
    plain = {column.strip().lower(): column for column, value in row.items() if _holds(value, field)}
    return next((plain[name] for name in (field, *_ALSO[field]) if name in plain), None)


def _holds(value: Any, field: str) -> bool:
    """Whether a field may hold a value. A cell that is empty says nothing."""
    if field == "messages":
        return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
    return value is None or isinstance(value, str | int if field == "label" else str)


def _accepted(layouts: Sequence[Layout]) -> str:
    return "; ".join(f"{' + '.join(layout.fields)} ({layout.task})" for layout in layouts)


def _toml(column: str) -> str:
    """A column as a setting's value: what TOML would read as something else than text is quoted."""
    bare = re.fullmatch(r"[^\W\d][\w-]*", column) and column not in ("true", "false", "inf", "nan")
    return column if bare else json.dumps(column, ensure_ascii=False)
