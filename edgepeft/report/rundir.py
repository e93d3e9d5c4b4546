"""Reads what a run left in its directory, however far it came."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError, UsageError

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The files of a run directory; ``None`` (or no events) where the run stopped before writing one.

    ``unreadable_lines`` counts lines of ``events.jsonl`` that are no events: a killed process leaves half a line.
    """

    path: Path
    recipe: str | None
    plan: Record | None
    events: list[Record]
    unreadable_lines: int
    ledger: list[Record] | None
    answers: Record | None

    @property
    def choice(self) -> Record | None:
        """The candidate that was planned for this run."""
        if self.plan is None or self.plan.get("choice") is None:
            return None
        chosen: Record = self.plan["candidates"][self.plan["choice"]]
        return chosen

    def last(self, event: str) -> Record:
        """The last event of a kind, or an empty one: a resumed run writes ``start`` again and its last word counts."""
        return next((e for e in reversed(self.events) if e["event"] == event), {})

    def series(self, event: str, *keys: str) -> list[tuple[int, float]]:
        """``(step, value)`` of the events of a kind, in order of step; ``keys`` lead to the value inside an event.

        A resumed run repeats the steps after its checkpoint: the later one counts. Values that are absent, NaN or
        infinite are left out.
        """
        points: dict[int, Any] = {}
        for found in (e for e in self.events if e["event"] == event and "step" in e):
            value: Any = found
            for key in keys:
                value = (value or {}).get(key)
            points[int(found["step"])] = value
        return [(step, float(v)) for step, v in sorted(points.items()) if v is not None and math.isfinite(v)]

    def described(self, key: str) -> str | None:
        """``model``, ``method``, ``precision`` or ``hardware``: the recipe's word, else the plan's."""
        try:
            recipe = tomllib.loads(self.recipe or "")
        except tomllib.TOMLDecodeError:
            recipe = {}  # the page still shows its text, which is how a reader finds the mistake
        value = recipe.get(key)
        if isinstance(value, dict):
            value = value.get("name")
        if not isinstance(value, str):
            value = (self.plan or {}).get(key) or (self.choice or {}).get(key)
        return None if value is None else str(value)


def read(path: Path) -> Run:
    """Read a run directory.

    Raises:
        UsageError: ``path`` is no directory.
        EdgePeftError: a file is there but is not what edgepeft writes.
    """
    if not path.is_dir():
        raise UsageError(
            f"There is no run directory {path}.",
            "A report is made of what a run left behind.",
            "Name the directory given to the run, or start one.",
        )
    recipe = path / "recipe.toml"
    plan = _json(path / "plan.json")
    if plan is not None:
        _require(path / "plan.json", plan, dict, ("hardware", "model", "candidates", "choice"))
        for candidate in plan["candidates"]:
            keys = ("method", "precision", "microbatch", "checkpointing", "fits", "peak_bytes", "bytes")
            _require(path / "plan.json", candidate, dict, keys)
        if plan["choice"] not in (None, *range(len(plan["candidates"]))):
            raise _damaged(path / "plan.json", f"its choice {plan['choice']} is none of its candidates")
    ledger = _json(path / "ledger.json")
    if ledger is not None:
        _require(path / "ledger.json", ledger, list, ())
        for row in ledger:
            _require(path / "ledger.json", row, dict, ("artefact", "metrics", "kept"))
    events, unreadable_lines = _events(path / "events.jsonl")
    answers = _json(path / "answers.json")
    if answers is not None:
        _require(path / "answers.json", answers, dict, ("question", "reference"))
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return Run(path, text, plan, events, unreadable_lines, ledger, answers)


def _events(path: Path) -> tuple[list[Record], int]:
    events: list[Record] = []
    unreadable = 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        elif line.strip():
            unreadable += 1
    return events, unreadable


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from error


def _require(path: Path, value: object, kind: type, keys: tuple[str, ...]) -> None:
    if not isinstance(value, kind):
        raise _damaged(path, f"it holds a {type(value).__name__} where a {kind.__name__} belongs")
    missing = [key for key in keys if isinstance(value, dict) and key not in value]
    if missing:
        raise _damaged(path, f"it has an entry without {', '.join(missing)}")


def _damaged(path: Path, cause: str) -> EdgePeftError:
    return EdgePeftError(
        f"{path} cannot be read.", f"It was changed or damaged: {cause}.", "Delete it and run the same command again."
    )
