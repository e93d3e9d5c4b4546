"""Which runs a row of the methods' table wants, and which it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.methods import base
from tuning import Bench, Row

FACTORS = (3.0, 10.0, 1.0)  # of the method's own rate; papers train for longer than here, so not below it at first
BEYOND = {1.0: 0.3, 10.0: 30.0}  # tried when the best is at an end
Key = tuple[float, int]  # factor and seed


def path_of(bench: Bench, row: Row, factor: float, seed: int) -> Path:
    """Where a run's result is, or will be."""
    return bench.folder / row.name / f"lr-x{factor:g}-seed-{seed}.json"


def rate(bench: Bench, row: Row, factor: float) -> float:
    """The learning rate of a row's runs at a factor."""
    return factor * bench.scale * base.find(row.method).learning_rate


def found(bench: Bench, row: Row) -> dict[Key, dict[str, Any]]:
    """The finished runs of a row."""
    pairs = [(factor, seed) for factor in (*FACTORS, *BEYOND.values()) for seed in (0, 1)]
    paths = {pair: path_of(bench, row, *pair) for pair in pairs}
    return {pair: read(path) for pair, path in paths.items() if path.exists()}


def read(path: Path) -> dict[str, Any]:
    """A finished run."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def best(results: Mapping[Key, Mapping[str, Any]]) -> float | None:
    """The factor of seed 0 with the lowest loss on the development examples; None where no run trained."""
    losses = {factor: run["dev"]["loss"] for (factor, seed), run in results.items() if seed == 0 and "dev" in run}
    return min(losses, key=losses.__getitem__, default=None)


def wanted(results: Mapping[Key, Mapping[str, Any]]) -> list[Key]:
    """All runs of a row in order, as far as ``results`` tells: three rates, one beyond an end, the best once more."""
    if any("refused" in run for run in results.values()):
        return list(results)
    keys = [(factor, 0) for factor in FACTORS]
    for _ in range(2):
        if any(key not in results for key in keys):
            return keys
        chosen = best({key: results[key] for key in keys})
        if chosen is None:
            return keys
        keys.append((BEYOND[chosen], 0) if chosen in BEYOND and len(keys) == len(FACTORS) else (chosen, 1))
        if keys[-1][1] == 1:
            break
    return keys


def complete(results: Mapping[Key, Mapping[str, Any]]) -> bool:
    """Whether nothing is missing."""
    return bool(results) and all(key in results for key in wanted(results))
