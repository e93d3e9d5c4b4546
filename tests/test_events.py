"""The log of a run: whole lines only, and after a resume no event twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgepeft import events
from edgepeft.errors import EdgePeftError


def steps(path: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events.read(path)]


def test_events_are_on_disk_when_written(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "events.jsonl")
    log.write("step", 1, loss=0.5, note="é\n")
    (event,) = events.read(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["loss"], event["note"]) == ("step", 1, 0.5, "é\n")
    assert event["time"] > 1.7e9
    log.close()


def test_a_resumed_log_forgets_what_will_happen_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = events.EventLog(path)
    written = (("start", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("checkpoint", 2), ("step", 3), ("end", 3))
    for event, step in written:
        log.write(event, step)
    log.close()
    events.EventLog(path, resumed_at=2).close()
    assert steps(path) == [("start", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("checkpoint", 2)]
    log = events.EventLog(path, resumed_at=2)
    log.write("resume", 2)
    log.close()
    assert steps(path)[-2:] == [("checkpoint", 2), ("resume", 2)]


def test_a_finished_log_that_is_gone_on_with_has_one_end(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "events.jsonl")
    log.write("step", 1)
    log.write("end", 1)
    log.close()
    log = events.EventLog(tmp_path / "events.jsonl", resumed_at=1)
    log.write("end", 1)
    log.close()
    assert steps(tmp_path / "events.jsonl") == [("step", 1), ("end", 1)]


def test_a_new_log_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 1}\n')
    events.EventLog(tmp_path / "events.jsonl").close()
    assert events.read(tmp_path / "events.jsonl") == []


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    assert steps(path) == [("step", 1)]
    log = events.EventLog(path, resumed_at=1)
    log.write("step", 2)
    log.close()
    assert steps(path) == [("step", 1), ("step", 2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path / "events.jsonl")
    log.close()
    log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115  (the log closes it)
    for write in (lambda: log.write("step", 1), log.close):
        with pytest.raises(EdgePeftError, match=r"The disk is full: .*events\.jsonl"):
            write()


def test_no_log_no_events(tmp_path: Path) -> None:
    assert events.read(tmp_path / "events.jsonl") == []


def test_memory_grows_with_what_is_held() -> None:
    cpu = torch.device("cpu")
    before = events.memory_bytes(cpu)
    held = torch.ones(512 << 20, dtype=torch.uint8)  # far more than the system may take from an idle process meanwhile
    assert events.memory_bytes(cpu) - before > 256 << 20
    del held


def test_the_bar_leaves_standard_output_to_results(capfd: pytest.CaptureFixture[str]) -> None:
    with events.progress_bar(2, 0, shown=True) as advance:
        advance({"loss": 0.5, "tokens_per_second": 10.0, "memory_bytes": 2**30})
    told = capfd.readouterr()
    assert "loss 0.500" in told.err and not told.out
