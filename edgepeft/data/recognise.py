"""From the columns of a data set to its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepeft.data import naming, shapes
from edgepeft.data.columns import LAYOUTS, TEXT_ONLY, Layout
from edgepeft.errors import UsageError, nearest


class Misfit(UsageError):
    """Columns that are not those of a task. Its remedy names flags of ``edgepeft run``."""


def recognise(name: str, row: Mapping[str, Any], *, task: str | None, columns: Mapping[str, str]) -> Layout:
    """The one layout that the columns of the source ``name`` have.

    Args:
        row: the first one: its keys are the columns.
        task: what the user wants to do with them, if he said so.
        columns: ``{field: column}`` where a column is not named like its field.

    Raises:
        Misfit: no layout fits, several do, or the task is another one.
        UsageError: there is no such task, field or column, or the data has the shape of another program's.
    """
    tasks = {layout.task for layout in LAYOUTS}
    if task is not None and task not in tasks:
        raise UsageError(f"There is no task {task!r}.", "", nearest(task, tasks))
    accepted = "; ".join(f"{' + '.join(layout.fields)} ({layout.task})" for layout in LAYOUTS)
    accepted += "; text with the task causal-lm (language modelling)"
    fields = {field for layout in LAYOUTS for field in layout.fields}
    for field, column in columns.items():
        if field not in fields:
            raise UsageError(
                f"There is no field {field!r} to give a column to.", f"Accepted: {accepted}.", nearest(field, fields)
            )
        if column not in row:
            raise UsageError(f"{name} has no column {column!r}.", f"It has {', '.join(row)}.", nearest(column, row))

    there = set(columns) | (set(row) - set(columns.values()))
    # Columns named by the user decide: a layout that leaves one of them unused is not what was meant.
    fitting = [layout for layout in LAYOUTS if there >= set(layout.fields) >= set(columns)]
    chosen = [layout for layout in fitting if task in (None, layout.task)]
    if task == TEXT_ONLY.task and "text" in there and (set(columns) == {"text"} or not fitting):
        chosen = [TEXT_ONLY]
    _refuse_shapes(name, row, task, columns, chosen)
    state = f"{name} has the columns {', '.join(row) or '(none)'}."
    if not chosen and fitting:
        fits = " and ".join(f"{' + '.join(layout.fields)} for {layout.task}" for layout in fitting)
        remedy = f"Use --task {fitting[0].task}"
        wanted = next(layout for layout in LAYOUTS if layout.task == task)
        if named := naming.guess(row, wanted, renaming=True):
            remedy += f", or name the columns that {task} should use instead: {naming.flags(named)}"
        if wanted.task == TEXT_ONLY.task and "text" in row:
            remedy += f", or learn the text alone: {naming.flags({'text': 'text'})}"
        raise Misfit(f"The data does not fit the task {task}.", f"{state} That is {fits}.", remedy)
    if not chosen:
        what = f"the task {task}" if task else "any task"
        cause = state if columns else f"{state}\nAccepted: {accepted}."
        raise Misfit(f"The data does not fit {what}.", cause, naming.advice(row, task, columns))
    if len(chosen) > 1:
        fits = " and ".join(f"{' + '.join(layout.fields)} ({layout.task})" for layout in chosen)
        ways = " or ".join(naming.flags({field: columns.get(field, field) for field in each.fields}) for each in chosen)
        raise Misfit(f"The data fits more than one layout: {fits}.", state, f"Name the columns to use: {ways}")
    [layout] = chosen
    return Layout(layout.task, layout.fields, tuple(columns.get(field, field) for field in layout.fields))


def _refuse_shapes(
    name: str, row: Mapping[str, Any], task: str | None, columns: Mapping[str, str], chosen: list[Layout]
) -> None:
    """Refuse data of another program's shape, unless the user named every column that is used of it."""
    if any(set(layout.fields) <= set(columns) for layout in chosen):
        return
    used = {columns.get(field, field) for layout in chosen for field in layout.fields}
    if shapes.is_alpaca(row) and task != "classification" and (not chosen or used & set(shapes.ALPACA)):
        raise shapes.alpaca(name, *("input", "target") if task == "seq2seq" else ("prompt", "completion"))
    conversation = next((column for column, value in row.items() if shapes.is_sharegpt(value)), None)
    if not chosen and conversation is not None and task in (None, "causal-lm"):
        raise shapes.sharegpt(name, conversation)
