"""Several processes that train one model end in the adapter that one alone makes, and hold the same to the last bit."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from safetensors.torch import load_file, save_file
from torch import nn

from edgepeft import adapter, checkpoint
from edgepeft.ranks import ALONE, Ranks, joined
from edgepeft.step import TrainingStep, targets

PEFT = '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4}'
# Of two microbatches, which either one device adds up or two: a sum of two numbers has no order.
SAME: dict[str, dict[str, Any]] = {
    "lora": {"options": {}},
    "lora-nf4": {"options": {}, "precision": "nf4"},
    "lora-uneven": {"options": {}, "microbatch": 3, "global_batch": 6},  # the last update has a single microbatch
    "adalora": {"method": "adalora", "options": {"rank": 4, "budget": 2}},  # a penalty, and work after updates
    "far": {"method": "far", "options": {"retention": 0.25, "priming": 0.3}},  # two stages
    "fish_mask": {"method": "fish_mask", "options": {"density": 0.2, "examples": 5}},  # which measures one by one
    "peft": {"method": "peft:lora.json", "options": {}},
}


@pytest.mark.parametrize("name", SAME)
def test_two_devices_make_the_adapter_of_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "peft":
        (tmp_path / "lora.json").write_text(PEFT, encoding="utf-8")
        SAME[name]["method"] = f"peft:{tmp_path / 'lora.json'}"
    chosen = training.written("causal-lm", **{"epochs": 1.0, "evaluations": 2, **SAME[name]})
    training.run(chosen, tmp_path / "one")
    assert training.together(dataclasses.replace(chosen, devices=2), tmp_path / "two") == [0, 0]
    assert training.result(tmp_path / "two") == training.result(tmp_path / "one")
    same = ("step", "loss", "grad_norm", "lr", "tokens")
    one, two = (training.log(tmp_path / out, "step") for out in ("one", "two"))
    assert [[event[key] for key in same] for event in two] == [[event[key] for key in same] for event in one]
    one, two = (training.log(tmp_path / out, "evaluation") for out in ("one", "two"))
    assert [event["metrics"] for event in two] == [event["metrics"] for event in one]


def test_gradients_differ_by_the_order_of_their_sum_alone(tmp_path: Path) -> None:
    """One device adds one microbatch after the other, two devices add their sums: each of the four additions rounds by
    2^-24 of what it made, which is no more than the sum of absolute values. The shares of both ranks differ in size.
    """
    processes = [training.SERVER.Process(target=_gradients, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone, count = _backward(BATCHES, ALONE), sum(targets(batch).numel() for batch in BATCHES)
    parts = [(_backward([batch], ALONE), targets(batch).numel() / count) for batch in BATCHES]
    assert one.keys() == alone.keys() and len(alone) > 1
    for name, gradient in alone.items():
        assert torch.equal(one[name], two[name])
        size = torch.stack([part[name].abs() * share for part, share in parts]).sum(0)
        assert ((one[name] - gradient).abs() <= 2 * 4 * 2**-24 * size).all() and gradient.abs().max() > 0, name


BATCHES = [tiny.batch("llama", rows=rows, seed=rows) for rows in (2, 3, 4, 5, 6)]


def _backward(batches: list[dict[str, torch.Tensor]], ranks: Ranks) -> dict[str, torch.Tensor]:
    made, method = tiny.adapted("llama", "lora")
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    step = TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=None, ranks=ranks)
    loss = step.backward(batches, 1e-3)
    found = {name: p.grad for name, p in adapter.trained(made.model).items() if p.grad is not None}
    return {**found, "loss": loss}


def _gradients(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    tiny.folder("llama")  # transformers lets only the first rank write
    with joined(rank, 2, "cpu", folder / "meeting") as ranks:
        save_file(_backward(BATCHES, ranks), folder / f"{rank}.safetensors")


def test_all_ranks_hold_the_same_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    """With dropout, whose random numbers are not the same."""
    chosen = training.written("causal-lm", devices=2, max_steps=4, evaluations=2)
    assert training.together(chosen, tmp_path / "whole") == [0, 0]
    assert _same(tmp_path)
    codes = training.together(chosen, tmp_path / "killed", on_forward=functools.partial(training.die_at, 3))
    assert codes[0] == 1 and codes[1] == -signal.SIGKILL and not (tmp_path / "killed" / "adapter").exists()
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints") is not None
    assert training.together(chosen, tmp_path / "killed") == [0, 0]
    assert training.result(tmp_path / "killed") == training.result(tmp_path / "whole")


def test_updates_that_are_rounded_at_random_are_the_same(tmp_path: Path) -> None:
    values = {"method": "full", "options": {}, "precision": "bf16", "optimizer": "adamw-8bit", "max_steps": 2}
    assert training.together(training.written("causal-lm", devices=2, **values), tmp_path / "run") == [0, 0]
    assert _same(tmp_path)


def _same(folder: Path) -> bool:
    one, two = (load_file(folder / f"rank-{rank}.safetensors") for rank in range(2))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_ctrl_c_in_one_stops_all_after_the_same_step(tmp_path: Path) -> None:
    chosen = training.written("causal-lm", devices=2, options={})
    assert training.together(chosen, tmp_path / "run", on_forward=_press) == [1, 1]
    stopped_at = training.log(tmp_path / "run", "step")[-1]["step"]
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.step_of(newest) == stopped_at < 10


def _press(number: int) -> None:
    if number == 4:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_whole_even_and_the_first_has_some(count: int) -> None:
    for length in range(20):
        items = list(range(length))
        parts = [Ranks(rank, count).mine(items) for rank in range(count)]
        assert [item for part in parts for item in part] == items
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_random_numbers_differ_between_ranks_and_steps_and_are_common_afterwards() -> None:
    drawn, after = [], []
    for step in (1, 2):
        for rank in range(2):
            torch.manual_seed(0)
            with Ranks(rank, 2).drawing_apart(7, step):
                drawn.append(float(torch.rand(())))
            after.append(float(torch.rand(())))
    assert len(set(drawn)) == 4 and len(set(after)) == 1
