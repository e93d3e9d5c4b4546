"""Training in several processes as a user has it: what they say and what stops them arrives here, once."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training

from edgepeft import hardware, launch, ledger, pipeline
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.recipe import Recipe
from edgepeft.train import Interrupted


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "traces"))


def two(**changes: Any) -> Recipe:
    return replace(training.written("causal-lm", options={}, checkpointing=False, devices=2), **changes)


def test_ctrl_c_and_the_same_command_again(tmp_path: Path) -> None:
    chosen, out = two(epochs=10.0), tmp_path / "run"

    def press_after_a_step() -> None:
        while not training.log(out, "step"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before, said = signal.getsignal(signal.SIGINT), list[str]()
    threading.Thread(target=press_after_a_step, daemon=True).start()
    with pytest.raises(Interrupted, match="Stopped after step") as caught:
        pipeline.run(chosen, out, until="train", say=said.append)
    assert caught.value.exit_code == launch.CTRL_C and signal.getsignal(signal.SIGINT) is before
    assert "on 2 devices" in next(line for line in said if line.startswith("plan:"))
    assert len([line for line in said if line.endswith("trained by lora")]) == 1
    done = training.log(out, "step")[-1]["step"]
    assert [event["step"] for event in training.log(out, "checkpoint")][-1] == done < 50
    pipeline.run(chosen, out, until="train", say=said.append)
    assert [event["step"] for event in training.log(out, "step")] == list(range(1, 51))
    assert {row.artefact for row in ledger.read(out / "ledger.json")} == {"base", "adapter"}
    (started,), (ended,) = training.log(out, "start"), training.log(out, "end")
    assert (started["devices"], started["strategy"]) == (2, "ddp")
    assert 0 < ended["measured_peak_bytes"] <= started["predicted_peak_bytes"]  # in which every token is a target


def test_an_error_of_all_is_raised_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EdgePeftError, match="became (nan|inf)") as caught:
        pipeline.run(two(lr=1e10, warmup=0.0), tmp_path / "run", until="train")
    assert type(caught.value) is EdgePeftError and "lr=" in caught.value.remedy
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out and "became" not in told.err + told.out
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_process_that_ends_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WORKER", "edgepeft.nothing")
    with pytest.raises(EdgePeftError, match="Process [12] of 2 ended before its training did") as caught:
        launch.train_together(two(), tmp_path / "run", "cpu", lambda line: None)
    assert "exit code is 1" in caught.value.cause and "same command" in caught.value.remedy


def test_more_devices_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = hardware.load("a100-40gb")
    assert launch.usable(gpu, 2) is gpu
    with pytest.raises(UsageError, match="This machine has 2 CUDA devices, not 4") as caught:
        launch.usable(gpu, 4)
    assert "--gpus 2" in caught.value.remedy


def test_processes_share_a_cpu_but_not_a_gpu() -> None:
    cpu, gpu = hardware.load("cpu-x86-16gb"), hardware.load("a100-40gb")
    assert gpu.shared(4) is gpu
    part = cpu.shared(4)
    assert part.available_bytes == cpu.available_bytes // 4 and part.memory_bytes == cpu.memory_bytes
    assert part.flops["fp32"] == cpu.flops["fp32"] / 4 and part.bandwidth == cpu.bandwidth / 4
