"""Measured rows of ``benchmarks/looser.csv`` are whole, and what cannot fit is never called FITS."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_rows_are_whole() -> None:
    looser: Any = importlib.import_module("looser")
    found = looser.read()
    assert len({(row.group, row.label) for row in found}) == len(found)
    for row in found:
        assert row.group in looser.GROUPS and (FOLDER / f"{row.harness}.py").exists()
        assert (row.measured_bytes is None) == (row.outcome == "oom")
        assert row.outcome != "oom" or looser._verdict(row, {"reserved_bytes": 10**12}) == "NO"
