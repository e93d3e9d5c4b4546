"""One row for every artefact of a run: how good, how large, how fast, and how far from the one before it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError
from edgepeft.files import write_json

RANKS = 256  # ranks of changes are told apart up to here


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artefact, measured on the same held-out examples as all others.

    Attributes:
        metrics: ``loss`` in nats, and ``accuracy`` or ``token_accuracy``.
        latency_ms: one example classified, or a prompt of 32 tokens read.
        tokens_per_second: generated after that.
        deviation: largest difference of logits from the artefact before, relative to the largest logit; of a graph to 1
            where all are smaller.
        same_tokens: share of greedily generated tokens equal to that artefact's.
        counts: what the survey's guidelines ask for. Of an adapter ``trained_parameters`` of the last stage (and
            ``trained_parameters_at_most``, where an earlier one trained more), ``training_peak_bytes`` and
            ``training_tokens_per_second``; of a merged model ``changed_parameters``,
            ``rank_of_change`` (the largest of any matrix, up to ``RANKS``), and tokens read a second in torch, in fp32,
            ``tokens_per_second_unmerged`` and ``tokens_per_second_merged``. An adapter that does not merge has
            ``changed_parameters`` (what it adds), ``tokens_per_second_unmerged`` and ``tokens_per_second_backbone``.
        stages: of an adapter, what each part of its training took: ``name``, parameters ``trained`` (none where a
            stage only measures), ``updates``,
            ``peak_bytes``, ``seconds``, ``tokens``, ``tokens_per_second``.
        kept: whether later artefacts are made from this one, or it goes to the device.
    """

    artefact: str
    metrics: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    latency_ms: float | None = None
    tokens_per_second: float | None = None
    deviation: float | None = None
    same_tokens: float | None = None
    counts: dict[str, float] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    kept: bool = True
    note: str = ""


def read(path: Path) -> list[Row]:
    """All rows of ledger.json, none when there is no file."""
    if not path.exists():
        return []
    try:
        return [Row(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise EdgePeftError(
            f"{path} is damaged.",
            str(error),
            "Delete it and run the same command again: what it held is measured again.",
        ) from error


def record(path: Path, *rows: Row) -> None:
    """Add rows; a row of the same artefact is replaced where it stands."""
    known = {row.artefact: row for row in read(path)}
    known.update({row.artefact: row for row in rows})
    write_json(path, [asdict(row) for row in known.values()])


def drop(path: Path, artefacts: Collection[str]) -> None:
    """Remove the rows of artefacts that are no more."""
    rows = read(path)
    if any(row.artefact in artefacts for row in rows):
        write_json(path, [asdict(row) for row in rows if row.artefact not in artefacts])


def find(path: Path, artefact: str) -> Row | None:
    """The row of an artefact, if it was recorded."""
    return next((row for row in read(path) if row.artefact == artefact), None)


def shown(metrics: Mapping[str, float]) -> str:
    """Metrics in a line of text."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
