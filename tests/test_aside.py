"""Where a model is merged that trained on a GPU."""

from __future__ import annotations

import pytest

from edgepeft import aside, hardware, machine
from edgepeft.errors import EdgePeftError
from edgepeft.plan import plan
from edgepeft.traces import fields

GiB = 2**30
A100, LAPTOP = hardware.load("a100-40gb"), hardware.load("cpu-x86-16gb")


def planned(merge_bytes: int) -> dict[str, dict[str, int]]:
    return {"predicted_phases": {"update": GiB, "merge": merge_bytes}}


def with_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    found = machine.Memory(total_bytes=free_bytes, available_bytes=free_bytes, total_source="", available_source="")
    monkeypatch.setattr(machine, "memory", lambda: found)


def test_what_fits_the_device_stays_there_and_the_rest_goes_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 64 * GiB)
    said: list[str] = []
    for known in (planned(30 * GiB), {}):  # there is no plan of an adapter that was trained elsewhere
        assert aside.device_after("merge", A100, known, said.append) == "cuda"
    assert aside.device_after("merge", LAPTOP, planned(30 * GiB), said.append) == "cpu"
    assert not said
    assert aside.device_after("merge", A100, planned(45 * GiB), said.append) == "cpu"
    assert said == ["merge: on the processor. In fp32 it takes 45.0 GiB; the device has 38.9 free."]


def test_it_is_refused_before_work_starts_where_neither_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 20 * GiB)
    with pytest.raises(EdgePeftError, match="Memory is short for the export") as caught:
        aside.device_after("export", A100, planned(45 * GiB), print)
    assert "20.0" in caught.value.cause and "`edgepeft export`" in caught.value.remedy


def test_a_plan_says_when_merging_does_not_fit_the_gpu() -> None:
    def why(name: str) -> str:
        return plan(
            name=name,
            model=fields(name),
            hardware=A100,
            task="seq2seq",
            tokens=512,
            methods=["lora"],
            precisions=["nf4"],
            checkpointing=True,
        ).why

    for name, aside_then in (("t5-11b", True), ("t5-large", False)):
        said = why(name)
        assert ("What follows training takes" in said) == aside_then
        assert ("which is done in the computer's own memory" in said) == aside_then
