"""The page shows what each stage of a training took, and what the ledger counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgepeft import ledger, report
from edgepeft.files import write_text
from edgepeft.ledger import Row

STAGES: list[dict[str, Any]] = [
    {"name": "gates", "trained": 1_234_567, "updates": 16, "peak_bytes": 300 * 2**20, "seconds": 4.0, "tokens": 4000},
    {"name": "sparse", "trained": 6_172, "updates": 90, "peak_bytes": 200 * 2**20, "seconds": 30.0, "tokens": 60_000},
]


def page(run: Path, stages: list[dict[str, Any]], **start: Any) -> str:
    shown = [{**stage, "tokens_per_second": stage["tokens"] / stage["seconds"]} for stage in stages]
    end = {"event": "end", "step": 106, "seconds": 34.0, "measured_peak_bytes": 300 * 2**20, "stages": shown}
    begin = {"event": "start", "step": 0, **start}
    write_text(run / "events.jsonl", json.dumps(begin) + "\n" + json.dumps(end) + "\n")
    return report.write(run).read_text(encoding="utf-8")


def test_each_stage_has_a_row(tmp_path: Path) -> None:
    text = page(tmp_path / "run", STAGES)
    for said in ("gates", "1,234,567", "300 MiB", "1,000", "sparse", "6,172", "200 MiB", "2,000"):
        assert said in text


def test_one_stage_needs_no_table(tmp_path: Path) -> None:
    assert "parameters trained" not in page(tmp_path / "run", STAGES[:1])


def test_several_devices_are_named(tmp_path: Path) -> None:
    for strategy, share in (("ddp", "a copy"), ("fsdp", "a part")):
        text = page(tmp_path / "run", STAGES, devices=2, strategy=strategy)
        assert f"2, each with {share} of the model" in text and text.count("of the model") == 1
    for start in ({"devices": 2}, {"devices": 1, "strategy": None}):  # the first of an older log
        assert "of the model" not in page(tmp_path / "run", STAGES, **start)


def test_counts_are_shown_in_their_units(tmp_path: Path) -> None:
    counts = {"trained_parameters": 6_172.0, "training_peak_bytes": 300.0 * 2**20}
    ledger.record(tmp_path / "run" / "ledger.json", Row(artefact="adapter", counts=counts, stages=STAGES))
    text = page(tmp_path / "run", STAGES)
    assert "trained parameters: 6,172; training peak: 300 MiB." in text
