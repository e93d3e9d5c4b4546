"""Training in stages: killed in any of them it ends in the same bytes, and what each took is told."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import conformance
import pytest
import tiny
import training

from edgepeft import adapter, checkpoint, schedule
from edgepeft import train as trainer
from edgepeft.methods import base
from edgepeft.recipe import Recipe

# What a recipe changes, and after which updates it is killed: in the first stage, between the two, in the last.
RUNS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lt_sft": ({"method": "lt_sft"}, (2, 5, 8)),
    "lt_sft-bf16": ({"method": "lt_sft", "precision": "bf16", "task": "classification"}, (2, 8)),
    "fish_mask": ({"method": "fish_mask"}, (4, 8, 12)),
    "fish_mask-bf16": ({"method": "fish_mask", "precision": "bf16", "task": "seq2seq"}, (4, 12)),
    "prefix_tuning": ({"method": "prefix_tuning"}, (4, 8)),
    "far": ({"method": "far", "options": {"priming": 0.5}}, (2, 5, 8)),
    "lets": ({"method": "lets", "task": "classification"}, (2, 5, 8)),
    "sparse_adapter": ({"method": "sparse_adapter"}, (2, 8)),
    "unipelt": ({"method": "unipelt"}, (4, 8)),
    "diff_pruning": ({"method": "diff_pruning"}, (2, 5, 8)),
    "diff_pruning-recomputing": ({"method": "diff_pruning", "task": "seq2seq", "checkpointing": True}, (3, 7)),
}
PROMPTED = ("ipt", "spot")  # begin with other runs' prompts
# A method that is new is killed in its first stage and in its last without being listed.
RUNS |= {
    name: ({"method": name}, (2, 8))
    for name in base.names()
    if name not in PROMPTED
    and name not in {changes["method"] for changes, _ in RUNS.values()}
    and len(tiny.method(name).stages()) > 1
}


def chosen_for(name: str) -> Recipe:
    changes, _ = RUNS[name]
    options = {**asdict(tiny.method(changes["method"])), **changes.get("options", {})}
    values: dict[str, Any] = {"task": "causal-lm", "lr": 1e-3} | changes | {"options": options}
    return training.written(**values)


@pytest.mark.parametrize("name", RUNS)
def test_killed_in_any_stage_ends_in_the_same_bytes(name: str, tmp_path: Path) -> None:
    chosen, whole = chosen_for(name), tmp_path / "whole"
    first_pass: dict[int, int] = {}  # of the update after so many

    def heard(number: int) -> None:
        first_pass.setdefault(len(training.log(whole, "step")), number)

    training.run(chosen, whole, heard)
    for updates in RUNS[name][1]:
        out = tmp_path / f"killed-{updates}"
        training.dies(training.run_until_killed, chosen, out, first_pass[updates] + 1, 0)
        newest = checkpoint.newest(out / "checkpoints")
        assert newest is not None and updates <= checkpoint.step_of(newest) <= updates + 1
        training.run(chosen, out)
        assert training.result(out) == training.result(whole), f"killed after {updates} updates"
        same = ("step", "loss", "lr", "grad_norm", "tokens")
        resumed, steps = training.log(out, "step"), training.log(whole, "step")
        assert [[event[key] for key in same] for event in resumed] == [[event[key] for key in same] for event in steps]


@pytest.mark.parametrize("name", PROMPTED)
def test_what_begins_with_other_runs_prompts_has_its_stages_and_may_be_killed(name: str, tmp_path: Path) -> None:
    def recipe_of(method: str, **changes: Any) -> Recipe:
        options = {**tiny.method(method, **changes.pop("others", {})).narrow, **changes.pop("options", {})}
        return training.written("causal-lm", method=method, options=options, lr=1e-2, epochs=1.0, **changes)

    prompt = {"length": 4}
    tuned = [
        str(training.run(recipe_of("prompt_tuning", options=prompt, seed=seed), tmp_path / f"task-{seed}").adapter)
        for seed in (0, 1)
    ]
    others = {"source": tuned[0]} if name == "spot" else {"prompts": tuple(tuned)}
    chosen, whole = recipe_of(name, others=others, options={**others, **prompt}), tmp_path / "whole"
    first_pass: dict[int, int] = {}

    def heard(number: int) -> None:
        first_pass.setdefault(len(training.log(whole, "step")), number)

    training.run(chosen, whole, heard)
    stages = base.create(name, chosen.options).stages()
    (end,) = training.log(whole, "end")
    assert [stage["name"] for stage in end["stages"]] == [stage.name for stage in stages if stage.updates != 0]
    steps = max(first_pass)
    for updates in {2, steps // 2, steps - 2}:
        out = tmp_path / f"killed-{updates}"
        training.dies(training.run_until_killed, chosen, out, first_pass[updates] + 1, 0)
        training.run(chosen, out)
        assert training.result(out) == training.result(whole), f"killed after {updates} updates"


@pytest.mark.parametrize("name", ["lora", "lt_sft", "fish_mask", "diff_pruning"])
def test_measuring_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first two updates of a stage are those that need most."""
    options = dict(tiny.method(name).narrow) | ({"dropout": 0.2} if name == "lora" else {})
    chosen = training.written("causal-lm", method=name, options=options, lr=1e-3)
    peaks = []
    for steps in (2, 0, 99):
        monkeypatch.setattr(trainer, "MEASURED_STEPS", steps)
        training.run(chosen, tmp_path / str(steps))
        peaks.append([stage["peak_bytes"] for stage in training.log(tmp_path / str(steps), "end")[0]["stages"]])
        assert training.result(tmp_path / str(steps)) == training.result(tmp_path / "2")
    assert peaks[1] == [0] * len(peaks[0])
    for early, ever in zip(peaks[0], peaks[2], strict=True):
        assert 0 < early == pytest.approx(ever, rel=0.01)


def test_what_each_stage_took_is_told(tmp_path: Path) -> None:
    chosen = chosen_for("fish_mask")
    done = training.run(chosen, tmp_path / "run")
    (end,), steps = training.log(tmp_path / "run", "end"), training.log(tmp_path / "run", "step")
    fisher, sparse = end["stages"]
    assert (fisher["name"], fisher["updates"], sparse["name"], sparse["updates"]) == ("fisher", 8, "sparse", 10)
    assert fisher["tokens"] == sum(event["tokens"] for event in steps[:8])
    assert sparse["tokens"] == sum(event["tokens"] for event in steps[8:])
    assert end["seconds"] == pytest.approx(fisher["seconds"] + sparse["seconds"])
    assert end["measured_peak_bytes"] == done.measured_peak_bytes == max(fisher["peak_bytes"], sparse["peak_bytes"])
    own = adapter.read_tensors(done.adapter / adapter.TENSORS)
    assert fisher["trained"] == 0, "it measures"
    assert sparse["trained"] == done.trained_parameters == own["sparse.values"].numel() > 0
    assert fisher["tokens_per_second"] == pytest.approx(fisher["timed_tokens"] / fisher["timed_seconds"])
    assert fisher["timed_tokens"] == sum(event["tokens"] for event in steps[2:8]), "not those that were watched"


def test_each_stage_has_its_own_schedule_and_optimizer(tmp_path: Path) -> None:
    chosen = chosen_for("lt_sft")
    training.run(chosen, tmp_path / "run")
    rates = [event["lr"] for event in training.log(tmp_path / "run", "step")]
    assert rates == 2 * [schedule.learning_rate(chosen, 1e-3, step, 5) for step in range(1, 6)]


def test_a_stage_of_single_examples_sees_one_at_a_time_and_is_not_clipped(tmp_path: Path) -> None:
    chosen = chosen_for("fish_mask")
    made, method, read = training.prepared(chosen, tmp_path / "cache")
    rows: list[int] = []
    made.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train(chosen, made, method, read, tmp_path / "run", start={})
    assert rows[:8] == [1] * 8 and rows[8] == 2
    steps = training.log(tmp_path / "run", "step")
    assert [event["grad_norm"] is None for event in steps] == [True] * 8 + [False] * 10
    lengths = sorted(read.train.lengths.tolist(), reverse=True)
    assert [steps[1]["tokens"], steps[0]["tokens"]] == lengths[:2]


def test_only_the_last_stage_makes_the_best_adapter(tmp_path: Path) -> None:
    """At a rate at which the first stage is best and the last gets worse."""
    chosen = training.written(
        "causal-lm", method="lt_sft", options={"density": 0.2}, lr=0.05, warmup=0.0, evaluations=10, patience=2
    )
    done = training.run(chosen, tmp_path / "run")
    evaluations = training.log(tmp_path / "run", "evaluation")
    last = [event for event in evaluations if event["step"] > 5]
    assert len(evaluations) > len(last) > 0 and not any(event["best"] for event in evaluations if event not in last)
    assert done.metrics["loss"] == min(event["metrics"]["loss"] for event in last)
    assert set(adapter.read_tensors(done.adapter / adapter.TENSORS)) == {"sparse.values", "sparse.positions"}


def test_evaluations_are_spread_over_the_stages_that_train(tmp_path: Path) -> None:
    chosen = training.written("causal-lm", method="fish_mask", options={"density": 0.1, "examples": 8}, evaluations=2)
    training.run(chosen, tmp_path / "run")
    assert [event["step"] for event in training.log(tmp_path / "run", "evaluation")] == [13, 18]


@pytest.mark.parametrize(
    "name", [name for name in base.names() if name not in ("ipt", "spot")]
)  # they need others' runs
def test_every_method_is_trained_through_all_its_stages(name: str, tmp_path: Path) -> None:
    """With accumulation where it can be, and the adapter of the last stage at the end."""
    family = conformance.home(name)
    method = tiny.method(name)
    task = {"bert": "classification", "llama": "causal-lm", "t5": "seq2seq"}[family]
    microbatch = 4 if method.updates_in_backward else 2
    chosen = training.written(
        task, method=name, options=asdict(method), max_steps=3, evaluations=2, microbatch=microbatch, epochs=1.0
    )
    done = training.run(chosen, tmp_path / "run")
    (end,) = training.log(tmp_path / "run", "end")
    assert [stage["name"] for stage in end["stages"]] == [s.name for s in method.stages() if s.updates != 0]
    assert all(stage["updates"] and stage["peak_bytes"] and stage["tokens"] for stage in end["stages"])
    made, _, _ = training.prepared(chosen, tmp_path / "cache")
    for number in range(1, len(method.stages())):
        base.begin(method, made, number)
    adapter.load(done.adapter, made.model)
