"""Shapes that data often has elsewhere, of which a part would be left out here, and how their rows are rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepeft.errors import UsageError

ALPACA = ("instruction", "input", "output")
_ALPACA = (
    '{{"{prompt}": "\\n".join(filter(None, [row["instruction"], row.get("input")])) + "\\n", '
    '"{answer}": row["output"]}}'
)
_SHAREGPT = (
    '{"messages": [{"role": "system", "content": row.get("system")}] * bool(row.get("system")) + '
    '[{"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"]), '
    '"content": turn["value"]} for turn in row["conversations"]]}'
)


def is_alpaca(row: Mapping[str, Any]) -> bool:
    """Whether what is asked stands in two columns, of which a pair of columns would leave one out."""
    return set(ALPACA) <= row.keys()


def alpaca(name: str, prompt: str, answer: str) -> UsageError:
    """Why the data ``name`` is refused. ``prompt`` and ``answer`` are the fields its task has."""
    return UsageError(
        f"{name} has the shape of Alpaca: {', '.join(ALPACA)}.",
        "What is asked stands in both instruction and input; with one of them alone, the other would be left out.",
        f"Rewrite each row as {prompt} (instruction, and input below it) and {answer} (output):\n"
        f"{_rewriting(_ALPACA.format(prompt=prompt, answer=answer))}",
    )


def is_sharegpt(conversation: Any) -> bool:
    """Whether a value is a conversation whose messages are written as from and value."""
    return isinstance(conversation, list) and any(
        isinstance(message, Mapping) and {"from", "value"} <= message.keys() for message in conversation
    )


def sharegpt(name: str, column: str) -> UsageError:
    """Why the data, or the row, ``name`` is refused."""
    return UsageError(
        f"{name}: {column!r} has the shape of ShareGPT: each message is written as from and value.",
        "A conversation is read from messages, each with role (system, user, assistant) and content.",
        f"Rewrite each row; human is the user, and gpt the assistant:\n{_rewriting(_SHAREGPT, column)}",
    )


def _rewriting(made: str, column: str = "conversations") -> str:
    """A command that rewrites JSON lines, row by row."""
    made = made.replace("conversations", column) if column.isidentifier() else made
    script = 'import json, sys; sys.stdin.reconfigure(encoding="utf-8-sig"); '
    script += f"[print(json.dumps({made})) for row in map(json.loads, filter(str.strip, sys.stdin))]"
    return f"python -c '{script}' < OLD.jsonl > NEW.jsonl"
