"""A task that a model is not trained for is refused, and what is said to be done instead works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tiny
import training
from typer.testing import CliRunner

from edgepeft import adapter, cli, pipeline, recipe, tasks
from edgepeft.errors import UsageError

ROWS = {
    "seq2seq": '{"input": "the fox", "target": "dog"}\n',
    "causal-lm": '{"prompt": "the fox", "completion": " dog"}\n',
    "classification": '{"text": "the fox", "label": "b"}\n{"text": "the dog", "label": "d"}\n',
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_which_are_refused(family: str) -> None:
    refused = set()
    for task in tasks.TASKS:
        try:
            tasks.check(tiny.configuration(family), task)
        except UsageError:
            refused.add(task)
    own = tiny.task(family)
    assert refused == set(tasks.TASKS) - {own} - ({"classification"} if own == "causal-lm" else set())


def test_one_that_there_is_not(tmp_path: Path) -> None:
    model = str(tiny.folder("llama"))
    tuned, method = tiny.adapted("llama", "lora")
    card = adapter.card(method, model=model, task="causal", precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "adapter", tuned.model, card)
    for command in (
        ["measure", "--model", model, "--seq-len", "24", "--method", "lora", "--task", "causal"],
        ["plan", "--infer", "--target", "raspberry-pi-5-8gb", "--model", model, "--task", "causal"],
        ["adapter", str(tmp_path / "adapter"), str(tmp_path / "theirs")],
    ):
        refused = CliRunner().invoke(cli.app, command).exception
        assert isinstance(refused, UsageError), command
        assert refused.fact == "There is no task 'causal'." and refused.remedy == "Did you mean causal-lm?"


@pytest.mark.parametrize(("of", "task"), tasks._REFUSED)
def test_a_run_is_refused_before_it_reads_the_data(of: str, task: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(ROWS[task] * 8)
    wanted = recipe.Recipe(model=str(training.source(of) / "model"), data=str(tmp_path / "data.jsonl"))
    with pytest.raises(UsageError, match=f"not trained for {task} here"):
        pipeline.run(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("of", "task"), [("causal-lm", "seq2seq"), ("seq2seq", "causal-lm")])
def test_columns_can_be_named_as_the_remedy_says(of: str, task: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(ROWS[task] * 8)
    model, data = str(training.source(of) / "model"), str(tmp_path / "data.jsonl")
    wanted = recipe.Recipe(model=model, data=data, method="ln_tuning", max_steps=1)
    with pytest.raises(UsageError) as caught:
        pipeline.run(wanted, tmp_path / "out", until="train")
    settings = dict(re.findall(r"--set columns\.(\w+)=(\w+)", caught.value.remedy))
    space = pipeline.run(dataclasses.replace(wanted, columns=settings), tmp_path / "out", until="train")
    assert space.stored().task == of and space.adapter.is_dir()
