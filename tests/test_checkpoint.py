"""A restored run has every number it had: parameters, optimizer states, random states and progress."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from edgepeft import adapter, checkpoint
from edgepeft.errors import EdgePeftError
from edgepeft.methods import base
from edgepeft.step import TrainingStep


def trainer(name: str, at: str, seed: int = 0) -> TrainingStep:
    made = tiny.load("bert", at, seed=seed)
    method = tiny.method(name)
    base.apply(method, made)
    made.model.train()
    clip = None if method.updates_in_backward else 1.0
    return TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.1), clip_norm=clip)


def train(step: TrainingStep, seed: int) -> None:
    step.backward([tiny.batch("bert", seed=seed)], 1e-3)
    step.update()


def tensors(step: TrainingStep) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(adapter.trained(step.model))
    for name, parameter in adapter.trained(step.model).items():
        for key, value in step.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = torch.as_tensor(value)
    return found


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("lora", "fp32"),
        ("lora", "nf4"),
        ("full", "bf16"),
        ("galore", "fp32"),
        ("galore", "bf16"),
        ("ln_tuning", "bf16"),
    ],
)
def test_everything_is_restored(name: str, at: str, tmp_path: Path) -> None:
    before = trainer(name, at)
    for seed in range(5):  # past a change of GaLore's subspace
        train(before, seed)
    where = checkpoint.save(tmp_path, before.model, before.optimizer, {"step": 5, "best": {"loss": 0.1}})
    assert where.name == "step-00000005"
    after = trainer(name, at, seed=1)
    assert checkpoint.restore(where, after.model, after.optimizer) == {"step": 5, "best": {"loss": 0.1}}
    expected, got = tensors(before), tensors(after)
    assert expected.keys() == got.keys() and len(expected) > 2 * len(before.trained)
    for key, value in expected.items():
        assert got[key].dtype is value.dtype and torch.equal(got[key], value), key
    for step in (before, after):
        torch.manual_seed(7)
        train(step, 6)
    expected, got = tensors(before), tensors(after)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def drawn() -> list[Any]:
    return [
        random.random(),
        np.random.random(),
        np.random.standard_normal(),
        random.gauss(0, 1),
        *torch.rand(3).tolist(),
    ]


def test_random_numbers_go_on(tmp_path: Path) -> None:
    step = trainer("lora", "fp32")
    train(step, 0)
    drawn()  # leaves one half of a pair of normal numbers in both generators
    where = checkpoint.save(tmp_path, step.model, step.optimizer, {"step": 1})
    expected = drawn()
    assert drawn() != expected
    checkpoint.restore(where, step.model, step.optimizer)
    assert drawn() == expected


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    step = trainer("lora", "fp32")
    assert checkpoint.newest(tmp_path / "nowhere") is None
    for number in (1, 2, 9, 10, 100):
        checkpoint.save(tmp_path, step.model, step.optimizer, {"step": number})
    (tmp_path / "best").mkdir()
    (tmp_path / ".step-00000200.1.part").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000100"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000100"


def test_a_state_that_does_not_match_its_tensors(tmp_path: Path) -> None:
    step = trainer("lora", "fp32")
    where = checkpoint.save(tmp_path, step.model, step.optimizer, {"step": 1})
    state = json.loads((where / checkpoint.STATE).read_text())
    (where / checkpoint.STATE).write_text(json.dumps({**state, "sha256": "0" * 64}))
    with pytest.raises(EdgePeftError, match="is damaged") as caught:
        checkpoint.restore(where, step.model, step.optimizer)
    assert "the beginning" in caught.value.remedy
