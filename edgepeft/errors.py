"""What a user is told when something cannot be done: the fact, the cause, the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class EdgePeftError(Exception):
    """Work that failed for a reason a user can act on. The command line prints it without a traceback and exits with 1.

    Args:
        fact: what is so, e.g. ``train.jsonl has a malformed row at line 17``.
        cause: why it is so, e.g. ``expected a JSON object, found a list``.
        remedy: what to do next, e.g. ``fix or delete the line``.
    """

    exit_code = 1

    def __init__(self, fact: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(fact)
        self.fact = fact
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return "\n".join(part for part in (self.fact, self.cause, self.remedy) if part)


class UsageError(EdgePeftError):
    """Input that is refused before work starts. Exit code 2."""

    exit_code = 2


def said(error: BaseException) -> str:
    """The first two lines of an error's text as one, up to 400 characters; with its type where that is a word alone."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    text = text if len(text) <= 400 else f"{text[:400]} ..."
    return text if " " in text else f"{type(error).__name__}: {text}"


def beside(path: str | Path) -> list[str]:
    """The paths that share the folder of a path which is not there: what may have been meant."""
    folder = Path(path).parent
    return [str(folder / entry.name) for entry in folder.iterdir()] if folder.is_dir() else []


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the entries of ``known`` closest to ``name`` or with it in them, or all if there are none."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    longer = [each for each in names if name and name.casefold() in each.casefold()]  # 4090 is typed for rtx-4090-24gb
    near = list(dict.fromkeys([*close, *longer]))[:5]
    return f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(names)}."
