"""When nothing fits, what would is found by planning again, and it is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgepeft import alternatives, hardware, planning
from edgepeft.hardware import Hardware
from edgepeft.plan import Plan

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
ASKED: dict[str, Any] = {
    **dict.fromkeys(("task", "target_tokens", "global_batch")),
    "method": "ln_tuning",
    "precision": "bf16",
    "tokens": 2048,
    "settings": [],
    "trust_remote_code": False,
    "progress": lambda done, total: None,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "traces"))


@pytest.fixture
def again(tmp_path: Path) -> Callable[..., Plan]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def plan(device: Hardware, /, **changes: Any) -> Plan:
        device = changes.pop("device", device)
        return planning.plan_model(str(tmp_path), device, **{**ASKED, **changes})

    return plan


def test_shorter_sequences_and_larger_machines_are_proposed_where_they_fit(again: Callable[..., Plan]) -> None:
    device = hardware.load("a100-40gb")
    sizes = [again(with_free(device, 1 << 20), tokens=tokens).least.process_bytes for tokens in (2048, 1024)]
    small = with_free(device, sum(sizes) // 2)
    failed = again(small)
    assert failed.choice is None
    found = alternatives.find(
        failed,
        lambda **changes: again(small, **changes),
        tokens=2048,
        global_batch=16,
        method="ln_tuning",
        precision="bf16",
    )
    said = alternatives.remedy(found)
    assert "--seq-len 1024 with ln_tuning on bf16" in said
    assert "jetson-orin-nano-8gb with ln_tuning on bf16" in said
    for way in found:  # each is true as it stands
        device = hardware.load(way.change["hardware"]) if "hardware" in way.change else small
        chosen = again(device, **{name: value for name, value in way.change.items() if name != "hardware"}).chosen()
        assert (chosen.method, chosen.precision, chosen.optimizer) == (way.method, way.precision, way.optimizer)
        assert "hardware" in way.change or chosen.least_bytes == way.least_bytes
    assert {"tokens", "hardware"} <= {name for way in found for name in way.change}


def test_sequences_are_not_shortened_in_vain(again: Callable[..., Plan]) -> None:
    none = with_free(hardware.load("a100-40gb"), 1 << 20)  # less than the weights
    failed = again(none)
    found = alternatives.find(
        failed, lambda **changes: again(none, **changes), tokens=2048, global_batch=16, method=None, precision=None
    )
    said = alternatives.remedy(found)
    assert "--seq-len" not in said and "--method" not in said and "jetson" in said


def test_a_narrower_adapter_is_proposed_where_it_fits(again: Callable[..., Plan]) -> None:
    device, asked = hardware.load("a100-40gb"), {"method": "lora", "tokens": 32}
    sizes = [
        again(with_free(device, 1 << 20), **asked, settings=[f"options.rank={rank}"]).least.process_bytes
        for rank in (256, 128)
    ]
    small = with_free(device, sum(sizes) // 2)
    failed = again(small, **asked, settings=["options.rank=256"])
    found = alternatives.find(
        failed,
        lambda **changes: again(small, **{**asked, **changes}),
        tokens=32,
        global_batch=16,
        method="lora",
        precision="bf16",
    )
    assert "--set options.rank=128 with lora on bf16" in alternatives.remedy(found)
    way, *_ = alternatives.find(  # any precision may do, and the default rank: of what is asked for neither is kept
        failed,
        lambda **changes: again(small, **{**asked, **changes, "method": "lora", "precision": "bf16"}),
        tokens=32,
        global_batch=16,
        method="lora",
        precision=None,
    )
    assert way.change["settings"] == [] and way.text.startswith("--method lora without --set --precision bf16")


def test_training_alone_is_proposed_where_merging_and_exporting_do_not_fit(again: Callable[..., Plan]) -> None:
    laptop, asked = hardware.load("cpu-x86-16gb"), {"method": "lora", "tokens": 32}
    none = with_free(laptop, 1 << 20)
    whole, alone = (again(none, **asked, whole=part).least.process_bytes for part in (True, False))
    small = with_free(laptop, (whole + alone) // 2)
    failed = again(small, **asked)
    assert failed.choice is None and "in exporting" in failed.nothing_fits("pi")[1]
    assert "`edgepeft train` alone fits" in failed.nothing_fits("pi")[2]
    way, *_ = alternatives.find(
        failed,
        lambda **changes: again(small, **{**asked, **changes}),
        tokens=32,
        global_batch=16,
        method="lora",
        precision=None,
    )
    assert way.change == {"whole": False} and way.text.startswith("`edgepeft train` alone with lora on")
    assert again(small, **{**asked, **way.change}).chosen().least_bytes == way.least_bytes


def test_a_machine_of_another_kind_is_proposed_where_there_is_none_alike(
    again: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By planning for it: what a CPU takes says nothing of a GPU."""
    none = with_free(hardware.load("t4-16gb"), 1 << 20)
    monkeypatch.setattr(hardware, "names", lambda: ["a100-40gb", "cpu-x86-16gb"])  # no GPU without bf16
    failed = again(none, precision=None)
    found = alternatives.find(
        failed, partial(again, none, precision=None), tokens=2048, global_batch=16, method=None, precision=None
    )
    named = [way.change["hardware"] for way in found if "hardware" in way.change]
    assert named == ["cpu-x86-16gb"] and again(hardware.load(named[0]), precision=None).choice is not None


def test_a_method_that_cannot_accumulate_is_offered_a_smaller_global_batch(again: Callable[..., Plan]) -> None:
    device, asked = hardware.load("a100-40gb"), {"method": "galore", "tokens": 512}
    sizes = [again(with_free(device, 1 << 20), **asked, global_batch=batch).least.process_bytes for batch in (16, 4)]
    small = with_free(device, sum(sizes) // 2)
    failed = again(small, **asked)
    assert failed.choice is None and {each.microbatch for each in failed.candidates} == {16}
    found = alternatives.find(
        failed, partial(again, small, **asked), tokens=512, global_batch=16, method="galore", precision=None
    )
    (way,) = [way for way in found if "global_batch" in way.change]
    chosen = again(small, **{**asked, **way.change}).chosen()
    assert chosen.microbatch == way.change["global_batch"] < 16


def test_the_nearest_precision_is_proposed(again: Callable[..., Plan]) -> None:
    device = hardware.load("a100-40gb")
    sizes = [again(with_free(device, 1 << 20), precision=at).least.process_bytes for at in ("fp32", "bf16")]
    small = with_free(device, sum(sizes) // 2)
    failed = again(small, precision="fp32")
    found = alternatives.find(
        failed, partial(again, small), tokens=2048, global_batch=16, method="ln_tuning", precision="fp32"
    )
    assert [way.change["precision"] for way in found if set(way.change) == {"precision"}] == ["bf16"]


def test_several_are_proposed_only_of_what_stands_with_others_in_a_machine(again: Callable[..., Plan]) -> None:
    """Four of a card that is full: the least that has room is the Jetson, which is alone on its board."""
    asked: dict[str, Any] = {"method": "lora", "tokens": 32, "devices": 4}
    none = with_free(hardware.load("a100-40gb"), 1 << 20)
    given: dict[str, Any] = {"tokens": 32, "global_batch": 16, "method": "lora", "precision": "bf16"}
    found = alternatives.find(again(none, **asked), partial(again, none, **asked), **given)
    (larger,) = [way for way in found if "hardware" in way.change]
    assert again(hardware.load(larger.change["hardware"]), **asked).choice is not None
    alone = with_free(hardware.load("jetson-orin-nano-8gb"), 1 << 20)
    one = {**asked, "devices": 1}
    found = alternatives.find(again(alone, **one), partial(again, alone, **one), **given)
    assert found and not [way for way in found if "devices" in way.change]


def with_free(device: Hardware, free_bytes: int) -> Hardware:
    return replace(device, memory_bytes=device.reserved_bytes + free_bytes)
