"""Updates, the stages they belong to, and learning rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import training

from edgepeft import schedule
from edgepeft.errors import UsageError


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("total", [1, 2, 10, 101])
def test_schedules_rise_and_fall(shape: str, warmup: float, total: int) -> None:
    chosen = training.written("causal-lm", schedule=shape, warmup=warmup)
    rates = [schedule.learning_rate(chosen, 2.0, step, total) for step in range(1, total + 1)]
    rise = math.ceil(warmup * total)
    assert rates[:rise] == [2.0 * step / rise for step in range(1, rise + 1)]
    fall = rates[rise:]
    assert all(a > b for a, b in zip(fall, fall[1:], strict=False)) and all(0 < rate <= 2.0 for rate in rates)
    if shape == "linear" and len(fall) > 2:
        slopes = [a - b for a, b in zip(fall, fall[1:], strict=False)]
        assert max(slopes) - min(slopes) < 1e-9
    if shape == "cosine" and len(fall) > 20:
        left = (total - rise) // 2  # half-way down, half the rate
        assert fall[left] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 1.0}, 5),
        ({"epochs": 2.0}, 10),
        ({"epochs": 0.5}, 3),
        ({"epochs": 2.0, "max_steps": 4}, 4),
        ({"epochs": 0.5, "max_steps": 4}, 3),
        ({"microbatch": 1}, 10),
        ({"microbatch": 4, "global_batch": 4}, 10),
    ],
)
def test_total_steps(changes: dict[str, Any], expected: int) -> None:
    assert schedule.total_steps(training.written("causal-lm", **changes), 20) == expected


@pytest.mark.parametrize(
    ("name", "options", "spans"),
    [
        ("lora", {}, [("train", 1, 10)]),
        ("lt_sft", {}, [("full", 1, 5), ("sparse", 6, 10)]),
        ("far", {"priming": 0.2}, [("priming", 1, 2), ("nodes", 3, 10)]),
        ("fish_mask", {"examples": 7}, [("fisher", 1, 7), ("sparse", 8, 17)]),
    ],
)
def test_stages_share_the_updates_or_have_their_own(name: str, options: dict[str, Any], spans: list[Any]) -> None:
    found = schedule.legs(training.written("causal-lm"), tiny.method(name, **options), 20)
    assert [(leg.stage.name, leg.first, leg.last) for leg in found] == spans


def test_every_stage_has_an_update() -> None:
    found = schedule.legs(training.written("causal-lm", max_steps=1), tiny.method("far"), 20)
    assert [(leg.first, leg.last) for leg in found] == [(1, 1), (2, 2)]


def test_states_in_8_bits_are_not_divided_among_devices() -> None:
    shared = {"devices": 2, "optimizer": "adamw-8bit"}
    schedule.check(training.written("causal-lm", strategy="ddp", **shared), tiny.method("lora"))
    with pytest.raises(UsageError, match="adamw-8bit cannot be used with FSDP") as caught:
        schedule.check(training.written("causal-lm", strategy="fsdp", **shared), tiny.method("lora"))
    assert "blocks" in caught.value.cause and "strategy=ddp" in caught.value.remedy
