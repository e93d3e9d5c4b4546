"""Real steps beside their predictions, on this machine; on a CUDA device where there is one."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from edgepeft import backbone, hardware, measure
from edgepeft.cli import app
from edgepeft.errors import EdgePeftError, UsageError


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ["--method", "lora", "--precision", "fp32"]),
        ("llama", ["--method", "lora", "--precision", "nf4", "--checkpointing"]),
        ("bert", ["--method", "full", "--precision", "fp32"]),
        ("t5", ["--method", "lst", "--precision", "bf16", "--target-len", "8", "--set", "options.reduction=4"]),
    ],
)
def test_a_real_step_holds_what_was_predicted(family: str, flags: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU is not what measure takes here")
    out = tmp_path / "rows.csv"
    command = ["measure", "--model", str(tiny.folder(family)), "--seq-len", "24", "--microbatch", "3", *flags]
    done = CliRunner().invoke(app, [*command, "--out", str(out), "--json"], catch_exceptions=False)
    row = json.loads(done.stdout)
    assert row["predicted_bytes"] == pytest.approx(row["allocated_bytes"], rel=0.01)
    assert row["process_bytes"] > row["allocated_bytes"] and row["seconds"] > 0
    with out.open(encoding="utf-8") as file:
        (stored,) = csv.DictReader(file)
    assert tuple(stored) == measure.COLUMNS and stored["predicted_bytes"] == str(row["predicted_bytes"])


@pytest.mark.parametrize(
    ("model", "gib", "microbatch", "told"),
    [
        ("t5-11b", 25, 1, "needs 46.* GiB, and 25.0 GiB are free[^$]*--precision of fewer bits"),
        ("llama", 1, 2000, "activations, .* in forward[^$]*Use a smaller --microbatch or --seq-len, or a"),
    ],
)
def test_what_would_not_fit_is_refused_before_it_is_allocated(model: str, gib: int, microbatch: int, told: str) -> None:
    source = backbone.resolve(model if model == "t5-11b" else str(tiny.folder(model)))
    less = dataclasses.replace(hardware.detect(), kind="cpu", memory_bytes=gib * 2**30, reserved_bytes=0)
    asked: dict[str, Any] = {"task": None, "method": "lora", "options": {}, "precision_": "fp32", "target_tokens": 16}
    with pytest.raises(EdgePeftError, match=told) as refused:
        measure.measure_model(source, less, **asked, microbatch=microbatch, tokens=64, checkpointing=False)
    assert refused.value.exit_code == 1


def test_more_tokens_than_positions_are_refused_as_plans_refuse_them() -> None:
    command = ["measure", "--model", str(tiny.folder("bert")), "--method", "prompt_tuning", "--seq-len", "100000"]
    with pytest.raises(UsageError, match="cannot read 100000 tokens[^$]*64 positions, of which prompt_tuning needs 5"):
        CliRunner().invoke(app, [*command, "--set", "options.length=5"], catch_exceptions=False)


def test_checkpointing_is_refused_where_training_refuses_it() -> None:
    command = ["measure", "--model", str(tiny.folder("llama")), "--method", "lst", "--checkpointing"]
    with pytest.raises(UsageError, match=r"lst is not trained with checkpointing[^$]*without --checkpointing"):
        CliRunner().invoke(app, [*command, "--set", "options.reduction=4"], catch_exceptions=False)


def test_rows_add_up(tmp_path: Path) -> None:
    """Also where an editor left the last line without an end."""
    row = dict.fromkeys(measure.COLUMNS, "a, b")
    measure.append(tmp_path / "rows.csv", row)
    (tmp_path / "rows.csv").write_text((tmp_path / "rows.csv").read_text().removesuffix("\n"), encoding="utf-8")
    measure.append(tmp_path / "rows.csv", row)
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [row, row]


@pytest.mark.parametrize(
    ("name", "holds", "told"),
    [
        ("rows.csv", b"a,b\n1,2\n", "holds other rows"),
        ("rows.csv", b"\xff\xfe", "not UTF-8"),
        ("", None, "cannot be written[^$]*is a folder"),
        ("missing/rows.csv", None, "cannot be written[^$]*no folder .*missing"),
    ],
)
def test_where_no_row_can_go_is_refused_before_any_work(
    name: str, holds: bytes | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_model", lambda *anything, **more: pytest.fail("it is measured"))
    out = tmp_path / name
    if holds is not None:
        out.write_bytes(holds)
    with pytest.raises(UsageError, match=told):
        command = ["measure", "--model", "gpt2", "--method", "lora", "--out", str(out)]
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert holds is None or out.read_bytes() == holds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    command = ["measure", "--model", str(tiny.folder("llama")), "--method", "lora", "--seq-len", "24", "--json"]
    row = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert 0 < row["allocated_bytes"] <= row["reserved_bytes"] and row["seconds"] > 0
