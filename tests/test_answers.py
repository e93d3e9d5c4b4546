"""Greedy answers are those of transformers' own generation, whatever a method puts into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from conformance import randomised

from edgepeft import answers, backbone, largest, probe, watch
from edgepeft.evaluate import totals
from edgepeft.methods import base
from edgepeft.surface import Configuration

MOST = 6
GENERATIVE = tuple(family for family in tiny.FAMILIES if tiny.task(family) != "classification")


def theirs(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST, do_sample=False, num_beams=1, pad_token_id=0
    )[0].tolist()
    return made[1:] if model.config.is_encoder_decoder else made[len(prompt) :]


@pytest.mark.parametrize("name", ["full", "lora", "prompt_tuning", "prefix_tuning", "lst", "unipelt", "adamix"])
@pytest.mark.parametrize("family", GENERATIVE)
def test_the_tokens_are_those_of_transformers(family: str, name: str) -> None:
    made, _ = tiny.adapted(family, name)
    model: Any = made.model
    randomised(model)
    for length in (1, 9):
        prompt = torch.randint(2, tiny.VOCABULARY, (length,)).tolist()
        model.train()
        found = answers.greedy(model, prompt, MOST, answers.stops(model))
        assert model.training, "left in the mode it was in"
        assert found == theirs(model.eval(), prompt)


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "lst"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_an_evaluation_holds_what_was_planned(family: str, name: str) -> None:
    """The states kept of what was read are as large as those on fake tensors. A prefix still has its network then."""
    made, method = tiny.load(family), tiny.method(name)
    base.apply(method, made)
    wanted = Configuration(
        model=backbone.as_fields(made.model.config),
        task=made.task,
        method=name,
        options=method.narrow,
        precision="fp32",
        checkpointing=False,
        microbatch=1,
        tokens=32,
        target_tokens=20,
        labels=2,
        accumulates=False,
        cuda=False,
        bf16=True,
    )
    recorded = probe.record(wanted, whole=True)
    planned = recorded.tracker.peaks()["evaluation"]
    batch = largest.batch(wanted)
    batch["attention_mask"][0, -1] = 0  # without any padding transformers drops the mask, and what it takes
    measured: dict[str, int] = {}
    with watch.peak(measured, "evaluation", made.model):
        totals(made.model, [batch])
        largest.answer(wanted, made.model)
    states = planned.bytes["optimizer"]  # which a trained model has beside it
    assert states > 0
    assert measured["evaluation"] == pytest.approx(planned.peak_bytes - states, rel=0.02)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_evaluations_of_a_run_have_answers(task: str, tmp_path: Path) -> None:
    chosen = training.written(task)
    done = training.run(chosen, tmp_path / "run")
    found = training.log(tmp_path / "run", "evaluation")
    best = [event["answers"] for event in found if event["best"]][-1]
    assert done.answers == best and len(best) == min(answers.ASKED, 2)
    made, _, read = training.prepared(chosen, tmp_path / "cache")
    asked = answers.Questions.of(read)
    asked.note(tmp_path / "answers.json", base=["a", "b"])
    asked.note(tmp_path / "answers.json", tuned=best)
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert kept["base"] == ["a", "b"] and kept["tuned"] == best
    assert kept["reference"] == [example.reference for example in asked.examples]


def test_a_question_and_its_answer_are_no_longer_than_any_example(tmp_path: Path) -> None:
    """There may be no positions behind, and no memory was planned for them."""
    _, _, read = training.prepared(training.written("causal-lm"), tmp_path / "cache")
    asked = answers.Questions.of(read, 100)
    longest = int(read.validation.lengths.max())
    assert 1 <= asked.most <= answers.TOKENS
    assert max(len(example.prompt_ids) for example in asked.examples) + asked.most <= longest


def test_a_classifier_has_nothing_to_say(tmp_path: Path) -> None:
    made, _, read = training.prepared(training.written("classification"), tmp_path / "cache")
    asked = answers.Questions.of(read)
    assert asked.answered(made.model) == []
    asked.note(tmp_path / "answers.json", base=[])
    assert not (tmp_path / "answers.json").exists()
