"""Training: however often interrupted, it ends in the same bytes; what cannot go on says why and loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import training
from safetensors.torch import load_file

from edgepeft import adapter, checkpoint, schedule
from edgepeft import train as trainer
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.evaluate import evaluate, validation_batches
from edgepeft.files import remove_leftovers
from edgepeft.recipe import Recipe

RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-nf4": {"precision": "nf4", "schedule": "linear"},
    "lora-recomputing": {"checkpointing": True},
    "full": {"method": "full", "options": {}},
    "full-8bit": {"method": "full", "options": {}, "optimizer": "adamw-8bit"},
    "full-bf16-8bit": {"method": "full", "options": {}, "precision": "bf16", "optimizer": "adamw-8bit"},
    "galore": {"method": "galore", "options": {"rank": 4, "period": 3}, "microbatch": 4},
    "lst-bf16": {"method": "lst", "options": {"reduction": 4}, "precision": "bf16"},
    "ln_tuning-classifier-bf16": {
        "task": "classification",
        "method": "ln_tuning",
        "options": {},
        "precision": "bf16",
        "global_batch": 2,
        "max_steps": 11,
    },
    "lora-seq2seq": {"task": "seq2seq"},
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_ends_in_the_same_bytes(name: str, tmp_path: Path) -> None:
    chosen = training.written(**{"task": "causal-lm"} | RUNS[name])
    training.run(chosen, tmp_path / "whole")
    steps = training.log(tmp_path / "whole", "step")
    accumulation = chosen.global_batch // (chosen.microbatch or 1)
    passes = random.randrange(4 * accumulation, 9 * accumulation)  # after the first checkpoint, before the last
    print(f"killed in forward pass {passes}")
    training.dies(training.run_until_killed, chosen, tmp_path / "killed", passes)
    assert not (tmp_path / "killed" / "adapter").exists()
    assert checkpoint.newest(tmp_path / "killed" / "checkpoints") is not None
    training.run(chosen, tmp_path / "killed")
    assert training.result(tmp_path / "killed") == training.result(tmp_path / "whole")
    resumed = training.log(tmp_path / "killed", "step")
    same = ("step", "loss", "lr", "grad_norm", "tokens")
    assert [[event[key] for key in same] for event in resumed] == [[event[key] for key in same] for event in steps]
    metrics = [event["metrics"] for event in training.log(tmp_path / "whole", "evaluation")]
    assert [event["metrics"] for event in training.log(tmp_path / "killed", "evaluation")] == metrics
    assert len(training.log(tmp_path / "killed", "resume")) == 1


def test_killed_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    chosen = training.written("causal-lm")
    training.dies(training.run_until_killed, chosen, tmp_path / "killed", 3)
    assert [event["step"] for event in training.log(tmp_path / "killed", "step")] == [1]
    training.run(chosen, tmp_path / "killed")
    training.run(chosen, tmp_path / "whole")
    assert training.result(tmp_path / "killed") == training.result(tmp_path / "whole")
    assert [event["step"] for event in training.log(tmp_path / "killed", "step")] == list(range(1, 11))


def test_killed_while_writing(tmp_path: Path) -> None:
    """Just before any of the renames of a run: events, best adapter, checkpoints, and the adapter itself."""
    chosen = training.written("causal-lm", max_steps=2, evaluations=2)
    training.run(chosen, tmp_path / "whole")
    deaths = 0
    for renames in range(100):
        out = tmp_path / f"killed-{renames}"
        process = training.SERVER.Process(target=training.run_until_killed_while_writing, args=(chosen, out, renames))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        training.run(chosen, out)
        assert training.result(out) == training.result(tmp_path / "whole"), f"killed before rename {renames}"
        leftovers = [path.name for path in out.rglob("*") if ".part" in path.name or ".old" in path.name]
        assert not leftovers
    assert deaths >= 7


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    chosen = training.written("causal-lm")

    def press(number: int) -> None:
        if number == 8:  # the first microbatch of step 5, or an evaluation before
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(trainer.Interrupted, match="Stopped after step") as caught:
        training.run(chosen, tmp_path / "stopped", press)
    assert caught.value.exit_code == 130 and "same command" in caught.value.remedy
    assert signal.getsignal(signal.SIGINT) is before
    stopped_at = training.log(tmp_path / "stopped", "step")[-1]["step"]
    newest = checkpoint.newest(tmp_path / "stopped" / "checkpoints")
    assert newest is not None and newest.name == f"step-{stopped_at:08d}" and 3 <= stopped_at <= 5
    training.run(chosen, tmp_path / "stopped")
    training.run(chosen, tmp_path / "whole")
    assert training.result(tmp_path / "stopped") == training.result(tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def press_twice(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.run(training.written("causal-lm"), tmp_path / "stopped", press_twice)


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    chosen = training.written("causal-lm")
    first = training.run(chosen, tmp_path / "run")
    before = training.result(tmp_path / "run")
    passes: list[int] = []
    again = training.run(chosen, tmp_path / "run", passes.append)
    assert training.result(tmp_path / "run") == before and again.metrics == first.metrics
    assert passes == []
    assert len(training.log(tmp_path / "run", "end")) == 1


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Recipe, Path]:
    """A run that was stopped after step 7, with checkpoints of steps 6 and 7."""

    def press(number: int) -> None:
        if number == 18:
            os.kill(os.getpid(), signal.SIGINT)

    chosen = training.written("causal-lm")
    with pytest.raises(trainer.Interrupted):
        training.run(chosen, tmp_path / "run", press)
    return chosen, tmp_path / "run"


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["cut short", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(
    stopped: tuple[Recipe, Path], file: str, damage: str
) -> None:
    chosen, out = stopped
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None
    path, content = newest / file, (newest / file).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = bytes([content[-99] ^ 1])
        path.write_bytes(content[:-99] if damage == "cut short" else content[:-99] + flipped + content[-98:])
    with pytest.raises(EdgePeftError, match="is damaged") as caught:
        training.run(chosen, out)
    others = sorted(path.name for path in (out / "checkpoints").glob("step-*") if path != newest)
    assert len(others) == 1 and others[0] in caught.value.remedy
    shutil.rmtree(newest)
    training.run(chosen, out)
    assert training.log(out, "resume")[-1]["step"] == int(others[0].removeprefix("step-"))
    training.run(chosen, out.parent / "whole")
    assert training.result(out) == training.result(out.parent / "whole")


def test_what_the_error_of_a_damaged_best_adapter_says_trains_anew(tmp_path: Path) -> None:
    chosen, out = training.written("causal-lm"), tmp_path / "run"
    training.run(chosen, out)
    made = training.result(out)
    shutil.rmtree(out / "adapter")
    best = out / "checkpoints" / "best" / "adapter.safetensors"
    best.write_bytes(best.read_bytes()[:-10])
    with pytest.raises(EdgePeftError, match="cannot be read") as caught:
        training.run(chosen, out)
    assert f"Delete the folder {out / 'checkpoints'} and run the same command again" in caught.value.remedy
    assert not (out / "adapter").exists()
    shutil.rmtree(out / "checkpoints")
    training.run(chosen, out)
    assert training.result(out) == made


def test_a_checkpoint_of_another_method_is_refused(stopped: tuple[Recipe, Path]) -> None:
    _, out = stopped
    with pytest.raises(EdgePeftError, match="does not belong to this model") as caught:
        training.run(training.written("causal-lm", method="ln_tuning", options={}), out)
    assert "missing" in caught.value.cause and "not in the model" in caught.value.cause


@pytest.mark.parametrize("evaluations", [1, 10])
def test_a_loss_that_is_not_a_number_stops_and_keeps_what_was_good(tmp_path: Path, evaluations: int) -> None:
    """Whether or not there is an evaluation between the update that ruins the weights and the next loss."""
    good = training.written("causal-lm", max_steps=3, evaluations=3)
    training.run(good, tmp_path / "run")
    kept = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    diverging = training.written("causal-lm", lr=1e10, warmup=0.0, evaluations=evaluations)
    with pytest.raises(EdgePeftError, match="(loss|gradient).* became (nan|inf)") as caught:
        training.run(diverging, tmp_path / "run")
    assert "learning rate" in caught.value.cause and "lr=" in caught.value.remedy
    assert kept == {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}


def test_the_last_update_is_not_trusted_blindly(tmp_path: Path) -> None:
    """No loss follows it, but the evaluation sees what it did."""
    with pytest.raises(EdgePeftError, match="became (nan|inf)"):
        training.run(training.written("causal-lm", lr=1e30, warmup=0.0, max_steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """A rate so high that evaluations get worse; resumed, it does no further step."""
    chosen = training.written("causal-lm", lr=0.3, warmup=0.0, evaluations=10, patience=1, schedule="linear")
    done = training.run(chosen, tmp_path / "run")
    evaluations = training.log(tmp_path / "run", "evaluation")
    losses = [event["metrics"]["loss"] for event in evaluations]
    best = losses.index(min(losses))
    assert len(losses) < 10 and len(losses) == best + 2
    assert done.metrics["loss"] == min(losses)
    assert training.log(tmp_path / "run", "end")[0]["best_step"] == evaluations[best]["step"]
    passes: list[int] = []
    training.run(chosen, tmp_path / "run", passes.append)
    assert passes == []


def test_the_best_adapter_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """Loaded anew, it has the metrics that the run reports."""
    from edgepeft import adapter

    chosen = training.written("classification", lr=0.05, warmup=0.0, evaluations=10, options={})
    done = training.run(chosen, tmp_path / "run")
    made, _, read = training.prepared(chosen, tmp_path / "cache")
    adapter.load(done.adapter, made.model)
    assert evaluate(made.model, validation_batches(read, chosen)) == done.metrics
    evaluations = [event["metrics"] for event in training.log(tmp_path / "run", "evaluation")]
    assert done.metrics["accuracy"] == max(metrics["accuracy"] for metrics in evaluations)
    card = adapter.read_card(done.adapter)
    assert (card.method, card.task, card.labels) == ("lora", "classification", ("long", "longer", "short"))


def test_checkpoints_are_few(tmp_path: Path) -> None:
    training.run(training.written("causal-lm", evaluations=10), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best", "step-00000009", "step-00000010"]


def test_events_tell_the_run(tmp_path: Path) -> None:
    chosen = training.written("causal-lm")
    done = training.run(chosen, tmp_path / "run")
    steps = training.log(tmp_path / "run", "step")
    _, _, read = training.prepared(chosen, tmp_path / "cache")
    for event in steps:
        assert event["lr"] == schedule.learning_rate(chosen, 5e-3, event["step"], 10)
        assert event["tokens_per_second"] > 0 and event["memory_bytes"] > 10**7 and event["grad_norm"] > 0
    padded = [
        len(part) * int(read.train.lengths[part].max())
        for epoch in (0, 1)
        for part in read.train.microbatches(2, seed=0, epoch=epoch)
    ]
    assert sum(event["tokens"] for event in steps) == sum(padded)
    assert [event["step"] for event in training.log(tmp_path / "run", "evaluation")] == [3, 6, 9, 10]
    (end,) = training.log(tmp_path / "run", "end")
    assert end["measured_peak_bytes"] == done.measured_peak_bytes > 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))


def test_every_example_is_seen_once_an_epoch(tmp_path: Path) -> None:
    """20 examples in microbatches of 3: the last update of an epoch is smaller."""
    chosen = training.written("causal-lm", microbatch=3, global_batch=6, epochs=2.0)
    assert schedule.total_steps(chosen, 20) == 8
    training.run(chosen, tmp_path / "run")
    assert len(training.log(tmp_path / "run", "step")) == 8


@pytest.mark.parametrize(
    ("changes", "fact", "remedy"),
    [
        ({"microbatch": 3}, "A global batch of 4 cannot be made of microbatches of 3", "microbatch=1"),
        ({"devices": 2, "microbatch": 4}, "of 4 cannot be made of microbatches of 4 on each of 2", "microbatch=2"),
        ({"devices": 2, "method": "galore", "options": {"rank": 4}}, "galore cannot be trained on 2", "--method lora"),
        ({"method": "galore", "options": {"rank": 4}}, "galore cannot accumulate", "global_batch to the microbatch, 2"),
        (
            {"method": "galore", "options": {"rank": 4}, "microbatch": 4, "optimizer": "adamw-8bit"},
            "galore cannot be trained with adamw-8bit",
            "--method full",
        ),
        (
            {"method": "lst", "options": {"reduction": 4}, "checkpointing": True},
            "lst is not trained with checkpointing",
            "checkpointing=false",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_first(
    changes: dict[str, Any], fact: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        training.run(training.written("causal-lm", **changes), tmp_path / "run")
    assert fact in caught.value.fact and remedy in caught.value.remedy
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_method_whose_gradients_do_not_arrive(tmp_path: Path) -> None:
    chosen = training.written("causal-lm", options={})
    made, method, read = training.prepared(chosen, tmp_path / "cache")
    unused = tiny.load("llama").model.lm_head
    unused.requires_grad_(True)
    made.model.add_module("unused", unused)
    with pytest.raises(EdgePeftError, match="No gradient reaches 1 of the trained tensors, such as unused.weight"):
        trainer.train(chosen, made, method, read, tmp_path / "run", start={})


def test_the_details_of_the_plan_are_logged(tmp_path: Path) -> None:
    chosen = training.written("causal-lm", max_steps=1)
    made, method, read = training.prepared(chosen, tmp_path / "cache")
    trainer.train(chosen, made, method, read, tmp_path / "run", start={"predicted_peak_bytes": 7})
    (start,) = training.log(tmp_path / "run", "start")
    assert start["predicted_peak_bytes"] == 7 and start["total_steps"] == 1


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    training.run(training.written("causal-lm", max_steps=1), tmp_path / "run")
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and {path.name for path in newest.iterdir()} == {"state.json", "state.safetensors"}
    assert json.loads((newest / "state.json").read_text())["progress"]["step"] == 1
    assert "random/torch" in load_file(newest / "state.safetensors")


def test_leftovers_of_killed_writes_are_cleared(tmp_path: Path) -> None:
    """Of files and of folders, at any depth; what is whole stays."""
    for name in (".adapter.17.part", "checkpoints/.best.17.old"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "half").touch()
    (tmp_path / "run" / ".events.jsonl.17.part").touch()
    (tmp_path / "run" / "report.html").touch()
    (tmp_path / "run" / "checkpoints" / "best").mkdir()  # without it the old one would be put back
    remove_leftovers(tmp_path / "run")
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert left == {"report.html", "checkpoints", "checkpoints/best"}


def test_ctrl_c_while_the_adapter_is_written_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, save = training.written("causal-lm", max_steps=2), adapter.save

    def pressed(directory: Path, *rest: Any) -> None:
        save(directory, *rest)
        if directory.name == "adapter":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(adapter, "save", pressed)
    with pytest.raises(trainer.Interrupted, match="Stopped after step 2 of 2"):
        training.run(chosen, tmp_path / "run")
    monkeypatch.setattr(adapter, "save", save)
    assert training.run(chosen, tmp_path / "run").adapter == tmp_path / "run" / "adapter"
