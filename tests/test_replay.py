"""What is reserved for a deep model, from shallow traces, is what a trace of the deep model reserves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planned import LLAMA, configuration
from test_plan import GPT2, T5

from edgepeft import candidate, extrapolate, replay
from edgepeft.catalog.fields import at_depth
from edgepeft.hardware import load
from edgepeft.probe import Recording, record
from edgepeft.surface import read

TRACED = 11  # the microbatch of the traces


def recorded(model: dict[str, object], layers: int, method: str, checkpointing: bool) -> Recording:
    task = "seq2seq" if model["model_type"] == "t5" else "causal-lm"
    wanted = configuration(method, "bf16", task=task, checkpointing=checkpointing, cuda=True, accumulates=True)
    return record(replace(wanted, model=at_depth(model, layers), microbatch=TRACED, tokens=60), whole=True)


@pytest.mark.parametrize(
    ("model", "method", "checkpointing"),
    [
        (LLAMA, "lora", True),
        (LLAMA, "lst", False),
        (T5, "full", False),
        ({**T5, "num_decoder_layers": 12}, "full", False),
        (GPT2, "houlsby", False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_layers_repeated_reserve_what_layers_traced_do(
    model: dict[str, object], method: str, checkpointing: bool
) -> None:
    low, high, deep = (recorded(model, layers, method, checkpointing) for layers in (2, 4, 8))
    assert replay.overhead(low, high, 2, TRACED) == replay.overhead(deep, deep, 0, TRACED)
    shallow = replay.overhead(high, high, 0, TRACED)
    assert shallow != replay.overhead(deep, deep, 0, TRACED), "a shallow model's would do, and this test says nothing"


def test_what_is_reserved_is_planned_and_survives_a_file() -> None:
    found = extrapolate.surface(configuration("lora", "bf16", cuda=True))
    again = read(found.plain())
    assert set(again.overhead) == set(replay.MICROBATCHES)
    for size in (1, 3, 16, 1000):
        held = sum(found.at(size)[1].values())
        assert again.reserved_bytes(size) == pytest.approx(found.reserved_bytes(size), rel=1e-3)
        assert found.reserved_bytes(size) >= held
    gpu, cpu = load("t4-16gb"), load("raspberry-pi-5-8gb")
    assert candidate.needed_bytes(100, gpu) == 100 < candidate.needed_bytes(100, cpu)


def test_on_a_cpu_nothing_is_replayed() -> None:
    found = extrapolate.surface(configuration("lora", "fp32", cuda=False))
    assert not found.overhead and found.reserved_bytes(4) == sum(found.at(4)[1].values())
