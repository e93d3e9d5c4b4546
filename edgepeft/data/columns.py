"""Which columns hold what, and whether each row holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from edgepeft.data import shapes
from edgepeft.errors import UsageError


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
                if shapes.is_sharegpt(value):
                    raise shapes.sharegpt(where, column)
                values[field] = _messages(where, value)
                _check_beside(where, row, value)
            elif field == "label" and isinstance(value, int):
                values[field] = str(value).lower() if isinstance(value, bool) else str(value)
            elif isinstance(value, str):
                values[field] = value
            else:
                expected, remedy = "text", "Correct the row."
                if field == "label":
                    expected = "text or a whole number"
                    remedy += " A number to predict is not supported; another column is named by"
                    remedy += " --set columns.label=NAME"
                raise UsageError(f"{where}: {column!r} should be {expected}.", f"It is {value!r:.80}.", remedy)
        return values


LAYOUTS = (
    Layout("classification", ("text", "label")),
    Layout("causal-lm", ("prompt", "completion")),
    Layout("seq2seq", ("input", "target")),
    Layout("causal-lm", ("messages",)),
)
TEXT_ONLY = Layout("causal-lm", ("text",))
"""Language modelling: every token is learned. Only on request: text alone may as well be a forgotten label."""


def needed(task: str) -> str:
    """The fields that data of a task has, in words."""
    ways = [" and ".join(layout.fields) for layout in (*LAYOUTS, TEXT_ONLY) if layout.task == task]
    return " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)


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
        _check_said(f"{where}: message {number}", message)
    roles = [message.get("role") for message in value]
    spoken = roles[1:] if roles[0] == "system" else roles
    if len(spoken) < 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise UsageError(
            f"{where}: the roles of 'messages' are {', '.join(map(str, roles))}.",
            "Expected user and assistant in turn, with at least one assistant, perhaps after one system message.",
            "Correct the row.",
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_beside(where: str, row: Mapping[str, Any], messages: list[dict[str, str]]) -> None:
    """Refuse what a prompt would lack: tools, and a system message in a column of its own.

    A template would put the model's default one in its place.
    """
    if row.get("tools") not in (None, "", [], "[]"):
        raise UsageError(
            f"{where}: the tools in the column 'tools' would be left out.",
            "A conversation is read from its messages alone.",
            "Write them into its system message, as the model is to read them on the device, or delete the column.",
        )
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
        raise UsageError(
            f"{where}: the system message in the column 'system' would be left out.",
            "A conversation is read from its messages alone.",
            "Write it as the first of them, with the role system, or delete the column.",
        )


_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def _check_said(which: str, message: Mapping[str, Any]) -> None:
    """Refuse a message that says more than its content: an answer would be learned as if it ended there."""
    if more := next((key for key in _BESIDE_CONTENT if message.get(key)), None):
        raise UsageError(
            f"{which} has {more}, which would be left out.",
            "A message is learned by its role and content alone.",
            f"Write into content what the model should say, or delete {more}.",
        )
    if message.get("role") == "assistant" and message.get("weight") == 0:
        raise UsageError(
            f"{which} has the weight 0, and would be learned.",
            "Every answer of a conversation is.",
            "End the conversation before it, or delete the weight.",
        )
