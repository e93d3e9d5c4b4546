"""Which variant goes to the device, and what the ledger says of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepeft import deploy, ledger
from edgepeft.ledger import Row


def row(variant: str, size: int, speed: float | None = None, ms: float = 1.0, kept: bool = True) -> Row:
    return Row(artefact=f"onnx-{variant}", bytes=size, tokens_per_second=speed, latency_ms=ms, kept=kept)


@pytest.mark.parametrize(
    ("fp32", "int8", "best"),
    [
        (row("fp32", 9, 100.0), row("int8", 3, 150.0), "int8"),
        (row("fp32", 9, 100.0), row("int8", 3, 95.0), "int8"),  # which may be chance
        (row("fp32", 9, 100.0), row("int8", 3, 60.0), "fp32"),
        (row("fp32", 9, ms=1.0), row("int8", 3, ms=1.1), "int8"),  # a classifier
        (row("fp32", 9, ms=1.0), row("int8", 3, ms=2.0), "fp32"),
        (row("fp32", 9, 100.0), row("int8", 3, 150.0, kept=False), "fp32"),  # it lost the fine-tune
    ],
)
def test_the_smallest_that_is_not_clearly_slower_is_chosen(fp32: Row, int8: Row, best: str) -> None:
    rows = {"fp32": fp32, "int8": int8}
    assert deploy.choose(rows) == best
    said = deploy._marked(int8, fp32, best == "int8").note
    assert ("On the device." == said) == (best == "int8")
    if best == "fp32" and int8.kept:
        assert "slower here than fp32" in said and "against" in said


def test_rows_of_artefacts_that_are_no_more_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    ledger.record(path, Row(artefact="base"), row("int8", 3), row("fp32", 9))
    ledger.drop(path, {"onnx-int8", "onnx-int4"})
    assert [each.artefact for each in ledger.read(path)] == ["base", "onnx-fp32"]
