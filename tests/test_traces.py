"""Surfaces that come with the catalogue: whole, fresh, and enough to plan without torch."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from edgepeft import catalog, evidence, extrapolate, machine, planning, recipe, surface, traces, units
from edgepeft import hardware as profiles
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.plan import PREFERRED

SHIPPED = sorted(
    file.name.removesuffix(".json.gz")
    for file in files("edgepeft.catalog").joinpath("traces").iterdir()
    if file.name.endswith(".json.gz")
)
GPU = "a100-40gb"


def test_the_shipped_table_of_methods_says_what_their_classes_say() -> None:
    for name in base.names():
        assert traces.traits(name) == traces.traits_of(base.find(name))
    assert traces.named("qlora") == ("lora", "nf4") and traces.named("lorra") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_cache_that_cannot_be_written_costs_time_only(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr("os.replace", fail)
    wanted = replace(traces.usual("gpt2", "lora", "bf16"), options={"rank": 3})
    assert traces.units(wanted)
    found = surface.read(extrapolate.surface(traces.usual("minilm-l6", "bitfit", "bf16", cuda=False)).plain())
    assert list(traces._kept([wanted], [found])) == [found]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", SHIPPED[:1])
@pytest.mark.parametrize(("method", "precision"), [("lora", "nf4"), ("ln_tuning", "bf16")])
def test_shipped_surfaces_are_what_would_be_traced_now(name: str, method: str, precision: str) -> None:
    wanted = traces.usual(name, method, precision)
    assert traces.shipped(wanted) == surface.read(extrapolate.surface(wanted).plain())


@pytest.mark.parametrize("name", SHIPPED[:1])
@pytest.mark.parametrize("more", [[], ["--gpus", "2"], ["--method", "qlora"]])
def test_a_shipped_model_is_planned_without_torch(name: str, more: list[str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        f"sys.argv = ['edgepeft', 'plan', '--model', {name!r}, '--gpu', {GPU!r}, '--json', *{more}]; "
        "from edgepeft.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: nothing fits
    found = json.loads(done.stdout)
    methods = {"lora"} if "--method" in more else set(PREFERRED) - ({"galore"} if more else set())
    assert {each["method"] for each in found["candidates"]} == methods


def test_every_model_of_the_catalogue_has_its_usual_configurations() -> None:
    """For GPUs that multiply bf16, and for those that do not."""
    for name in catalog.names():
        for method in PREFERRED:
            wanted = traces.usual(name, method, "bf16")
            assert traces.shipped(wanted) is not None, (name, method)
            assert traces.shipped(traces.usual(name, method, "fp32", bf16=False)) is not None, (name, method)
            assert traces.units_key(wanted) in traces._shipped_surfaces(name), (name, method)


@pytest.mark.parametrize("name", [name for name in catalog.names() if catalog.traced_as(name) != name])
def test_a_model_of_the_same_sizes_has_the_same_surface(name: str) -> None:
    wanted = traces.usual(name, "ln_tuning", "nf4")
    assert traces.shipped(wanted) == surface.read(extrapolate.surface(wanted).plain())
    assert traces.shipped(wanted) == traces.shipped(traces.usual(catalog.traced_as(name), "ln_tuning", "nf4"))


@pytest.mark.parametrize(("method", "precision"), [("lora", "nf4"), ("lst", "bf16"), ("full", "bf16")])
def test_shipped_parameters_are_what_would_be_counted_now(method: str, precision: str) -> None:
    wanted = traces.usual("t5-11b", method, precision)
    assert traces.units(wanted) == units.of(wanted)


def test_parameters_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    wanted = replace(traces.usual("gpt2", "lora", "bf16"), options={"rank": 3})
    found = traces.units(wanted)
    monkeypatch.setattr(units, "of", None)
    assert traces.units(replace(wanted, checkpointing=True, tokens=8)) == found
    with pytest.raises(TypeError):
        traces.units(replace(wanted, options={"rank": 4}))


@pytest.mark.parametrize("name", SHIPPED[:1])
def test_the_recipe_of_a_plan_is_one_that_runs_accept(name: str, tmp_path: Path) -> None:
    found = planning.plan_model(
        name,
        profiles.load(GPU),
        task=None,
        method="qlora",
        precision=None,
        tokens=None,
        target_tokens=None,
        global_batch=12,
        settings=[],
        trust_remote_code=False,
        progress=lambda done, total: None,
    )
    made = planning.recipe(found, "some.jsonl", found.hardware.name, None, None, 12)
    recipe.write(made, tmp_path / "recipe.toml")
    assert recipe.create(recipe.read(tmp_path / "recipe.toml")) == made
    assert (made.method, made.precision) == ("lora", "nf4") and 12 % (made.microbatch or 0) == 0


@pytest.mark.parametrize(
    "wrong", [{"method": "qlora", "precision": "bf16"}, {"tokens": 0}, {"objective": "beauty"}, {"precision": "int4"}]
)
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    values: dict[str, object] = dict.fromkeys(
        ("task", "method", "precision", "tokens", "target_tokens", "global_batch")
    )
    with pytest.raises(UsageError):
        planning.plan_model(
            "t5-small",
            profiles.load(GPU),
            settings=[],
            trust_remote_code=False,
            progress=lambda done, total: None,
            **{**values, **wrong},  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(("tokens", "settings"), [(450, []), (500, ["options.length=50"]), (1, ["options.length=512"])])
def test_a_prompt_takes_positions_from_the_input(tokens: int, settings: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        planning.plan_model(
            "minilm-l6",
            profiles.load(GPU),
            task=None,
            method="prompt_tuning",
            precision="bf16",
            tokens=tokens,
            target_tokens=None,
            global_batch=None,
            settings=settings,
            trust_remote_code=False,
            progress=lambda done, total: None,
        )
    assert "512 positions" in caught.value.cause and caught.value.remedy


def test_a_plan_leaves_a_prompt_its_positions_when_no_length_is_asked_for() -> None:
    asked = dict.fromkeys(("task", "tokens", "target_tokens", "global_batch"))
    found = planning.plan_model(
        "minilm-l6",
        profiles.load(GPU),
        method="prompt_tuning",
        precision="bf16",
        settings=[],
        trust_remote_code=False,
        progress=lambda done, total: None,
        **asked,  # type: ignore[arg-type]
    )
    assert found.chosen().fits
    too_long = replace(traces.usual("minilm-l6", "prompt_tuning", "bf16"), tokens=413)
    (refused,) = traces.find([too_long])
    assert isinstance(refused, UsageError) and "512 positions" in refused.cause


def test_a_changed_method_from_elsewhere_is_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(traces, "_source", traces._source.__wrapped__)  # in one process it is asked for twice
    source = "from edgepeft.methods.houlsby import Houlsby\n\n\nclass Theirs(Houlsby):\n    saves = ()\n"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "method.py").write_text(source)
    wanted = replace(traces.usual("minilm-l6", "lora", "bf16"), method="theirs.method")
    before = traces._path(wanted)
    assert traces._path(wanted) == before
    (tmp_path / "theirs" / "method.py").write_text(source + "    narrow = {}\n")
    assert traces._path(wanted) != before


def test_progress_never_goes_back_or_beyond_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path))
    seen: list[tuple[int, int]] = []
    small = replace(traces.usual("minilm-l6", "bitfit", "bf16"), tokens=16)
    wanted = [small, replace(small, precision="fp32"), replace(small, checkpointing=True)]
    traces.find(wanted, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[0] == (0, 3) and seen[-1] == (3, 3)


def test_memory_left_to_others_is_not_planned_with() -> None:
    device = profiles.load(GPU)
    assert planning.leaving(device, 1).available_bytes == device.available_bytes - 2**30
    with pytest.raises(UsageError):
        planning.leaving(device, 2**10)


def test_evidence_that_disagrees_is_shown_from_both_sides() -> None:
    survey, metamath = evidence.of("ln_tuning")
    assert "t5-11b 73.8" in survey and "0.0% to 0.0%" in metamath
    assert set(evidence.sources()) == {"survey", "metamath"} and evidence.of("galore") == []


def test_a_stage_that_updates_nothing_is_not_planned() -> None:
    """Prefixes are trained through an MLP; the stage that drops it takes none of the training's memory or time."""
    found = extrapolate.surface(traces.usual("minilm-l6", "prefix_tuning", "bf16", cuda=False))
    assert {name for name in found.phases if name.endswith("forward+backward")} == {"train: forward+backward"}
    _, held = found.at(1, ["checkpoint"])
    assert held["adapter"] > 4 * traces.fields("minilm-l6")["hidden_size"] * 512, "with the MLP that is trained"


@pytest.mark.parametrize(("processors", "gigabytes", "count"), [(64, 4, 8), (2, 64, 2), (4, 0.1, 1)])
def test_as_many_processes_trace_as_have_a_processor_and_memory(
    processors: int, gigabytes: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = machine.Memory(
        total_bytes=1 << 40, available_bytes=int(gigabytes * 1e9), total_source="", available_source=""
    )
    monkeypatch.setattr(machine, "processors", lambda: processors)
    monkeypatch.setattr(machine, "memory", lambda: memory)
    started: list[int] = []
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda workers, **others: started.append(workers))
    traces._pool.__wrapped__()
    assert started == [count]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_processes_that_trace_end_with_their_parent() -> None:
    code = (
        "import os, time\nfrom edgepeft import traces\n"
        "if __name__ == '__main__': print(traces._pool().submit(os.getpid).result(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        parent.kill()
    end = time.monotonic() + 60
    while child.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not child.exists()
