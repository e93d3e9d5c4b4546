"""The choice among what fits: the JSON the issue fixes, what is tried and what is refused."""

from __future__ import annotations

import json

import pytest
from planned import LLAMA, small_plan

from edgepeft import candidate, hardware
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.surface import ADAMW, EIGHT_BIT


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "traces"))


def test_json_has_the_promised_form() -> None:
    found = json.loads(json.dumps(small_plan().as_json()))
    assert found["hardware"] == "t4-16gb" and found["model"] == "tiny" and found["choice"] == 0
    candidate = found["candidates"][0]
    assert {"method", "precision", "microbatch", "checkpointing", "fits", "peak_bytes", "bytes"} <= candidate.keys()
    assert candidate["fits"] is True and sum(candidate["bytes"].values()) == candidate["peak_bytes"]


def test_the_microbatch_is_the_largest_that_fits() -> None:
    small = hardware.load("t4-16gb")
    tight = hardware.Hardware(**{**vars(small), "memory_bytes": small.reserved_bytes + (160 << 20)})
    best = small_plan(hardware=tight).chosen()
    more = small_plan(hardware=tight, microbatch=best.microbatch + 1)
    assert 1 <= best.microbatch < candidate.LARGEST_MICROBATCH
    assert candidate.needed_bytes(best.reserved_bytes, tight) <= tight.available_bytes
    assert best.verdict == "FITS" and more.candidates[0].verdict == "TIGHT"
    much = small_plan(hardware=tight, microbatch=2 * best.microbatch)
    assert much.candidates[0].verdict == "NO" and much.choice is None


def test_when_nothing_fits_the_error_says_what_would() -> None:
    small = hardware.load("t4-16gb")
    none = hardware.Hardware(**{**vars(small), "memory_bytes": small.reserved_bytes + 1000})
    with pytest.raises(EdgePeftError) as caught:
        small_plan(hardware=none).chosen("my boards/t4.toml")
    assert "does not fit" in caught.value.fact
    assert caught.value.remedy == "`edgepeft plan --gpu 'my boards/t4.toml' --model tiny` looks for what would."


def test_a_packed_backbone_cannot_be_tuned_in_full() -> None:
    with pytest.raises(UsageError, match="cannot train on nf4"):
        small_plan(methods=["full"], precisions=["nf4"])


def test_a_method_that_is_not_for_a_model_is_left_out_with_its_reason() -> None:
    found = small_plan(methods=["lora", "cross_attention"])
    assert {each.method for each in found.candidates} == {"lora"}
    assert "cross_attention" in found.excluded and found.excluded["cross_attention"]
    with pytest.raises(UsageError):
        small_plan(methods=["cross_attention"])


def test_usable_microbatch_divides_the_global_batch() -> None:
    assert [candidate.usable_microbatch(largest, 12) for largest in (1, 5, 7, 12, 100)] == [1, 4, 6, 12, 12]
    assert candidate.usable_microbatch(10**12, 10**12) == 10**12  # at once


def test_stopping_at_the_first_that_fits_chooses_the_same() -> None:
    both = {"methods": ["lora", "ln_tuning"], "precisions": ["fp32", "nf4"], "checkpointing": None}
    every, soon = small_plan(**both), small_plan(**both, first=True)
    assert soon.chosen() == every.chosen()
    assert {(each.method, each.precision) for each in soon.candidates} == {("lora", "fp32")}
    assert len(soon.candidates) < len(every.candidates)


def test_many_methods_are_planned_in_further_precisions_only_where_they_do_not_fit_well() -> None:
    both = {"methods": ["lora", "ln_tuning"], "precisions": ["fp32", "nf4"]}
    roomy, exact = small_plan(**both, sparing=True), small_plan(**both)
    assert [each.precision for each in roomy.candidates] == ["fp32", "fp32"] and roomy.chosen() == exact.chosen()
    least = small_plan(**both, sparing=True, objective="memory")
    assert [each.precision for each in least.candidates] == ["nf4", "nf4"]
    small = hardware.load("t4-16gb")
    none = hardware.Hardware(**{**vars(small), "memory_bytes": small.reserved_bytes + 1000})
    assert len(small_plan(**both, sparing=True, hardware=none).candidates) == 4


def test_the_objective_of_speed_takes_the_shortest_update() -> None:
    found = small_plan(methods=["lora", "ln_tuning"], objective="speed")
    times = {each.method: each.update_seconds for each in found.candidates}
    assert found.chosen().method == "ln_tuning" == min(times, key=lambda method: times[method] or 0.0)
    assert small_plan(methods=["lora", "ln_tuning"]).chosen().method == "lora"
    assert "estimated" in found.why


def test_states_in_8_bits_are_tried_where_nothing_fits_well_with_others() -> None:
    wide = {"model": {**LLAMA, "vocab_size": 60_000, "num_hidden_layers": 2}, "methods": ["full"]}
    needs = [small_plan(**wide, microbatch=1, optimizer=kind).chosen().process_bytes for kind in (ADAMW, EIGHT_BIT)]
    roomy = hardware.load("t4-16gb")
    tight = hardware.Hardware(**{**vars(roomy), "memory_bytes": roomy.reserved_bytes + sum(needs) // 2})
    assert needs[1] < 0.8 * needs[0] and {each.optimizer for each in small_plan(**wide).candidates} == {ADAMW}
    found = small_plan(**wide, hardware=tight)
    assert [(each.optimizer, each.fits) for each in found.candidates] == [(EIGHT_BIT, True), (ADAMW, False)]
    assert "8 bits" in found.why and found.as_json()["candidates"][0]["optimizer"] == EIGHT_BIT
    assert small_plan(**wide, hardware=tight, first=True).chosen() == found.chosen()
    lesser = {**wide, "methods": ["full", "dora"]}  # which fits well without them, but is preferred less
    assert [small_plan(**lesser, hardware=tight, first=soon).chosen() for soon in (True, False)] == [found.chosen()] * 2
    assert small_plan(**wide, hardware=tight, optimizer=ADAMW).choice is None
    least = small_plan(**wide, objective="memory")
    assert least.chosen().optimizer == EIGHT_BIT
    frugal = small_plan(**{**wide, "methods": ["lora"]}, hardware=tight, microbatch=1024)
    assert {each.optimizer for each in frugal.candidates} == {ADAMW}, "there is little to be saved"


def test_an_optimizer_that_a_method_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="galore cannot be trained with adamw-8bit"):
        small_plan(methods=["galore"], optimizer=EIGHT_BIT)
    both = small_plan(methods=["galore", "lora"], optimizer=EIGHT_BIT)
    assert {(each.method, each.optimizer) for each in both.candidates} == {("lora", EIGHT_BIT)}
