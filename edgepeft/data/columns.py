"""Which columns hold what, and whether each row holds it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from edgepeft.errors import UsageError, nearest


@dataclass(frozen=True)
class Layout:
    """A task and the fields an example of it has. ``columns`` says which column of the source holds each field."""

    task: str
    fields: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def features(self) -> datasets.Features:
        """How an example is stored: its fields, and where it stands in the source."""
        text = datasets.Value("string")
        messages = datasets.List({"role": text, "content": text})
        stored = {field: messages if field == "messages" else text for field in self.fields}
        return datasets.Features({**stored, "where": text})

    def example(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of one row.

        Raises:
            UsageError: a field is missing, empty or of the wrong type; the message names file and row.
        """
        values: dict[str, Any] = {"where": where}
        for field, column in zip(self.fields, self.columns, strict=True):
            value = row.get(column)
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                state = "is empty" if column in row else "is missing"
                raise UsageError(f"{where}: {column!r} {state}.", "", "Fill it in or delete the row.")
            if field == "messages":
                values[field] = _messages(where, value)
            elif field == "label" and isinstance(value, int):
                values[field] = str(value).lower() if isinstance(value, bool) else str(value)
            elif isinstance(value, str):
                values[field] = value
            else:
                expected = "text or a whole number" if field == "label" else "text"
                raise UsageError(
                    f"{where}: {column!r} should be {expected}.", f"It is {value!r:.80}.", "Correct the row."
                )
        return values


LAYOUTS = (
    Layout("classification", ("text", "label")),
    Layout("causal-lm", ("prompt", "completion")),
    Layout("seq2seq", ("input", "target")),
    Layout("causal-lm", ("messages",)),
)
TEXT_ONLY = Layout("causal-lm", ("text",))
"""Language modelling: every token is learned. Only on request: text alone may as well be a forgotten label."""


def recognise(name: str, found: Collection[str], *, task: str | None, columns: Mapping[str, str]) -> Layout:
    """The one layout that the columns ``found`` in the source ``name`` have.

    Args:
        task: what the user wants to do with them, if he said so.
        columns: ``{field: column}`` where a column is not named like its field.

    Raises:
        UsageError: no layout fits, several do, or the task is another one.
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
        if column not in found:
            raise UsageError(f"{name} has no column {column!r}.", f"It has {', '.join(found)}.", nearest(column, found))

    there = set(columns) | (set(found) - set(columns.values()))
    # Columns named by the user decide: a layout that leaves one of them unused is not what was meant.
    fitting = [layout for layout in LAYOUTS if there >= set(layout.fields) >= set(columns)]
    chosen = [layout for layout in fitting if task in (None, layout.task)]
    if task == TEXT_ONLY.task and "text" in there and (set(columns) == {"text"} or not fitting):
        chosen = [TEXT_ONLY]
    state = f"{name} has the columns {', '.join(found) or '(none)'}."
    if not chosen and fitting:
        fits = " and ".join(f"{' + '.join(layout.fields)} for {layout.task}" for layout in fitting)
        wanted = next(layout for layout in LAYOUTS if layout.task == task).fields
        named = " ".join(f"--set columns.{field}=..." for field in wanted)
        remedy = f"Use --task {fitting[0].task}, or name the columns that {task} should use: {named}"
        raise UsageError(f"The data does not fit the task {task}.", f"{state} That is {fits}.", remedy)
    if not chosen:
        what = f"the task {task}" if task else "any task"
        remedy = f"Accepted: {accepted}. Rename the columns, or name them, e.g. --set columns.text=review"
        raise UsageError(f"The data does not fit {what}.", state, remedy)
    if len(chosen) > 1:
        fits = " and ".join(f"{' + '.join(layout.fields)} ({layout.task})" for layout in chosen)
        raise UsageError(f"The data fits more than one layout: {fits}.", state, "Name the task or the columns to use.")
    [layout] = chosen
    return Layout(layout.task, layout.fields, tuple(columns.get(field, field) for field in layout.fields))


def _messages(where: str, value: Any) -> list[dict[str, str]]:
    """A conversation: perhaps a system message, then user and assistant in turn, with an answer to learn from."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UsageError(
            f"{where}: 'messages' should be a list of {{role, content}}.", f"It is {value!r:.80}.", "Correct the row."
        )
    for number, message in enumerate(value, 1):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise UsageError(
                f"{where}: message {number} has no text.",
                f"Its content is {content!r:.80}; it has {', '.join(map(str, message)) or 'nothing'}.",
                "A message is written as role and content: correct the row.",
            )
    roles = [message.get("role") for message in value]
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) < 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise UsageError(
            f"{where}: the roles of 'messages' are {', '.join(map(str, roles))}.",
            "Expected user and assistant in turn, with at least one assistant, perhaps after one system message.",
            "Correct the row.",
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]
