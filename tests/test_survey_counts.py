"""Trained parameters are those that ``benchmarks/survey_counts.py`` lists as the survey's, and so is its table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(FOLDER))  # its rows are this test's
counts: Any = importlib.import_module("survey_counts")


@pytest.mark.parametrize("row", counts.ROWS)
def test_trained_parameters_are_those_the_survey_printed(row: str) -> None:
    name, options, printed = counts.ROWS[row]
    for size, millions in zip(counts.SIZES, printed, strict=True):
        expected, _ = counts.UNREACHED.get((row, size), (millions, ""))
        assert round(counts.trained(size, name, options) / 1e6, 2) == expected, size


def test_the_table_is_what_is_counted() -> None:
    assert counts.RESULTS.read_text(encoding="utf-8") == counts.report()


def test_printed_numbers_of_prefixes_and_hybrids_are_those_of_other_settings() -> None:
    """The reasons above, counted."""
    ten = {size: counts.trained(size, "prefix_tuning", {"length": 10}) for size in ("t5-large", "t5-11b")}
    assert round(ten["t5-large"] / 1e6, 2) == 77.25
    assert round(counts.trained("t5-large", "mam", {}) / 1e6, 2) == 171.07
    assert round(counts.trained("t5-11b", "mam", {"bottleneck": 512}) / 1e6, 2) == 1262.39
    gates = (72 + 2 * 48) * (1024 + 1)  # of a prefix in each attention and two adapters in each layer
    assert round((ten["t5-11b"] + counts.trained("t5-11b", "houlsby", {}) + gates) / 1e6, 2) == 1224.78
