"""Methods as plain data: their places in the survey's taxonomy, their papers and their hyper-parameters."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any, get_args

from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.surface import DDP, FSDP


def describe(method: type[base.Method]) -> dict[str, Any]:
    """A method as plain data: its place in the survey's taxonomy, its paper and its hyper-parameters."""
    if method.__module__ == "edgepeft.foreign":
        raise UsageError(
            "edgepeft does not describe what HF PEFT can do.", "Its documentation does.", "Or see docs/peft.md."
        )
    name = method.__module__.removeprefix(f"{base.__package__}.")
    said = meanings(method)
    options = [
        {"name": field.name, "default": field.default, "meaning": said.get(field.name, "")}
        for field in dataclasses.fields(method)
    ]
    return {
        "name": name,
        "kind": method.kind,
        "merges": method.merges,
        "saves": [*method.saves, *([] if method.backpropagates else ["backpropagation"])],
        "strategies": [] if method.updates_in_backward else [DDP, *([FSDP] if method.shardable else [])],
        "overhead": method.overhead,
        "paper": str(method.paper),
        "summary": inspect.cleandoc(method.__doc__ or "").splitlines()[0],
        "aliases": dict(method.aliases),
        "learning_rate": method.learning_rate,
        "options": options,
    }


def meanings(kind: type) -> dict[str, str]:
    """What the fields of a dataclass mean: the string below each."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        entry.target.id: str(text.value.value)
        for entry, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def catalogue() -> list[dict[str, Any]]:
    """All methods that come with edgepeft as plain data, by kind."""
    kinds = get_args(base.Kind)
    return sorted((describe(base.find(name)) for name in base.names()), key=lambda each: kinds.index(each["kind"]))
