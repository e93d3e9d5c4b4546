"""``edgepeft plan`` as it is typed: flags that contradict, machines by methods, hours of a job."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console
from typer.testing import CliRunner, Result

from edgepeft import hardware, planpage, recipe, schedule, tables, traces
from edgepeft.cli import app
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.methods import base
from edgepeft.plan import Candidate, Plan

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path_factory.getbasetemp() / "traces"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--all-gpus", "--gpu", "t4-16gb"], "--all-gpus and --gpu"),
        (["--all-gpus", "--reserve", "1"], "--all-gpus and --reserve"),
        (["--all-gpus", "--recipe", "r.toml"], "--all-gpus and --recipe"),
        (["--gpu", "t4-16gb", "--html", "h.html"], "--html says nothing without --all-gpus"),
        (["--gpu", "t4-16gb", "--data", "d.jsonl"], "--data says nothing without --recipe"),
        (["--gpu", "t4-16gb", "--epochs", "2"], "--epochs says nothing without --examples"),
        (["--gpu", "t4-16gb", "--json", "--markdown"], "--json and --markdown"),
        (["--target", "raspberry-pi-5-8gb"], "--target says nothing without --infer"),
        (["--infer", "--markdown"], "--infer and --markdown"),
        (["--infer", "--target", "raspberry-pi-5-8gb", "--reserve", "8"], "raspberry-pi-5-8gb has 7.4 GiB free"),
        (["--method", "lora", "--method=full"], "--method lora and --method full do not go together"),
        (["--gpu", "t4-16gb", "--hardware", "a100-40gb"], "--gpu t4-16gb and --hardware a100-40gb"),
        (["--infer", "--all-gpus", "--objective", "speed"], "--infer and --all-gpus, --objective"),
        (["--gpu", "t4-16gb", "--examples", "0"], "--examples 0 must be above 0"),
        (["--gpu", "t4-16gb", "--examples", "9", "--epochs", "nan"], "--epochs nan must be above 0"),
        (["--gpu", "t4-16gb", "--seq-len", str(10**12)], "--seq-len 1000000000000 must be above 0"),
        (["--gpu", "t4-16gb", "--target-len", str(10**12)], "--target-len 1000000000000 must be above 0"),
        (["--gpu", "t4-16gb", "--global-batch", str(10**12)], "--global-batch 1000000000000 must be above 0"),
        (["--infer", "--target", "raspberry-pi-5-8gb", "--seq-len", str(10**12)], "cannot read 1000000000000 tokens"),
        (["--gpu", "t4-16gb", "--objective", "beauty"], "'beauty' is not known"),
        (["--all-gpus", "--gpus", "2"], "--all-gpus and --gpus"),
        (["--gpu", "t4-16gb", "--gpus", "0"], "--gpus 0 must be positive"),
        (["--gpu", "t4-16gb", "--gpus", "3"], "16 cannot be shared among 3"),
        (["--gpu", "raspberry-pi-5-8gb", "--gpus", "2"], "is not a GPU"),
        (["--gpu", "jetson-orin-nano-8gb", "--gpus", "4"], "no machine with 4 x jetson-orin-nano-8gb"),
        (["--gpu", "t4-16gb", "--gpus", "2", "--method", "galore"], "galore cannot be trained on 2 devices"),
    ],
)
def test_flags_that_contradict_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan("--model", "gpt2", *arguments)
    assert named in caught.value.fact and caught.value.exit_code == 2


def test_a_context_that_has_no_end_has_one_in_plans() -> None:
    with pytest.raises(UsageError, match="--seq-len 1000000000000 must be above 0, and no more than 1,048,576"):
        plan("--model", "t5-small", "--infer", "--target", "raspberry-pi-5-8gb", "--seq-len", str(10**12))


def test_every_machine_is_a_row_in_the_terminal_the_page_and_the_json(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny), "--all-gpus", "--method", "lst", "--precision", "fp32"]
    page = tmp_path / "machines.html"
    shown = plan(*arguments, "--html", str(page))
    plans = json.loads(plan(*arguments, "--json").stdout)
    assert shown.exit_code == 0
    assert {each["hardware"] for each in plans} == set(hardware.names())
    for name in hardware.names():
        assert name in shown.stdout and name in page.read_text(encoding="utf-8")
    assert all(each["candidates"][0]["update_seconds"] > 0 for each in plans)


def test_a_page_is_written_over_a_page_and_over_nothing_else(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny), "--all-gpus", "--method", "lst", "--precision", "fp32"]
    page, other = tmp_path / "machines.html", tmp_path / "mine.html"
    other.write_bytes(b"<title>mine</title>\xff")
    for _ in range(2):
        assert plan(*arguments, "--html", str(page)).exit_code == 0
    with pytest.raises(UsageError, match=r"--html .*mine.html is already there[^$]*Nothing in it was touched"):
        plan(*arguments, "--html", str(other))
    assert other.read_bytes() == b"<title>mine</title>\xff"


def test_the_recipe_of_several_gpus_is_one_that_can_be_run(tiny: Path, tmp_path: Path) -> None:
    written = tmp_path / "recipe.toml"
    arguments = ["--gpu", "t4-16gb", "--gpus", "2", "--method", "lora", "--precision", "fp32", "--recipe", str(written)]
    assert plan("--model", str(tiny), *arguments).exit_code == 0
    made = recipe.create(recipe.read(written))
    assert made.devices == 2 and made.microbatch == 8
    schedule.check(made, base.create("lora"))


@pytest.mark.parametrize(
    ("command", "takes"),
    [("plan", "options.NAME"), ("measure", "options.NAME"), ("run", "key=value"), ("merge", "variants")],
)
def test_help_says_what_a_command_can_be_set(command: str, takes: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert takes in next(line for line in shown.splitlines() if "--set" in line)


def test_a_recipe_that_is_there_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    written = tmp_path / "recipe.toml"
    asked = ["--model", str(tiny), "--gpu", "t4-16gb", "--method", "lora", "--precision", "fp32"]
    found = plan(*asked, "--recipe", str(written))
    assert "data.jsonl" in found.stderr and "--data" in found.stderr
    before = written.read_bytes()
    with pytest.raises(UsageError, match="is already there"):
        plan(*asked, "--recipe", str(written), "--data", "mine.jsonl")
    assert written.read_bytes() == before


def test_a_flag_may_be_repeated_with_its_value_or_where_it_takes_several(tiny: Path) -> None:
    asked = ["--model", str(tiny), "--gpu", "t4-16gb", "--method", "lora", "--precision", "fp32", "--method", "lora"]
    assert plan(*asked, "--set", "options.rank=2", "--set", "options.rank=4").exit_code == 0


def test_inference_leaves_what_is_reserved() -> None:
    asked = ["--model", "gpt2", "--infer", "--target", "raspberry-pi-5-8gb", "--json"]
    full, less = (json.loads(plan(*asked, *more).stdout)["available_bytes"] for more in ([], ["--reserve", "1"]))
    assert full - less == 2**30


def test_what_would_fit_leaves_what_is_reserved_too() -> None:
    """Otherwise the device that is asked about, which is too small for both, would be named."""
    asked = ("--model", "llama-3.1-8b", "--method", "lora", "--precision", "nf4", "--reserve", "6", "--json")
    (way,) = json.loads(plan(*asked, "--gpu", "rtx-4060-8gb").stdout)["alternatives"]
    assert way["change"] == {"hardware": "rtx-4080-16gb"}
    assert plan(*asked, "--gpu", "rtx-4080-16gb").exit_code == 0
    assert plan(*asked, "--gpu", "rtx-3060-12gb").exit_code == 1
    running = ("--infer", "--model", "llama-3.2-3b", "--reserve", "5", "--target")
    shown = plan(*running, "raspberry-pi-5-8gb")
    assert shown.exit_code == 1 and "--target cpu-x86-16gb" in shown.output
    assert plan(*running, "cpu-x86-16gb").exit_code == 0


def test_what_would_fit_is_looked_for_where_no_method_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "names", lambda: ["ln_tuning", "lora"])  # all of them take minutes to trace
    shown = plan("--method", "all", "--gpu", "rtx-4060-8gb", "--model", "llama-3.1-70b", "--json")
    assert shown.exit_code == 1 and json.loads(shown.stdout)["alternatives"]


def test_values_of_an_option_that_is_named_again_are_all_tried(tiny: Path, tmp_path: Path) -> None:
    """The one that is wanted most first; the recipe has that which is chosen."""
    written = tmp_path / "recipe.toml"
    widths = [each for rank in (32, 4) for each in ("--set", f"options.rank={rank}")]
    asked = ["--model", str(tiny), "--gpu", "a100-40gb", "--method", "lora", "--precision", "bf16", *widths]
    found = json.loads(plan(*asked, "--set", "options.ratio=16.0", "--json").stdout)
    tried = [each["options"] for each in found["candidates"] if not each["checkpointing"]]
    assert tried == [{"rank": 32, "ratio": 16.0}, {"rank": 4, "ratio": 16.0}]
    wide, narrow = (each["bytes"]["adapter"] for each in found["candidates"] if not each["checkpointing"])
    assert wide == pytest.approx(8 * narrow, rel=0.05)
    shown = plan(*asked, "--objective", "memory", "--recipe", str(written)).stdout
    assert "lora, rank=32" in shown and "lora, rank=4" in shown
    assert recipe.create(recipe.read(written)).options == {"rank": 4}
    with pytest.raises(UsageError, match="rank = 0"):
        plan(*asked, "--set", "options.rank=0")


def test_what_fits_by_fsdp_alone_is_written_so(tmp_path: Path) -> None:
    """Full tuning of 2.1 thousand million parameters in fp32 on GPUs of 16 GB."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | shape))
    written = tmp_path / "recipe.toml"
    asked = ["--gpu", "t4-16gb", "--method", "full", "--precision", "fp32"]
    assert "FSDP2 divides" in plan("--model", str(tmp_path), "--gpus", "4", *asked, "--recipe", str(written)).stdout
    chosen = recipe.create(recipe.read(written))
    assert (chosen.devices, chosen.strategy) == (4, "fsdp")
    with pytest.raises(EdgePeftError, match="does not fit") as caught:
        plan("--model", str(tmp_path), *asked)
    assert "by FSDP with full on fp32" in caught.value.remedy


def planned(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(*arguments, "--json").stdout)
    return found


def chosen(*arguments: str) -> dict[str, Any]:
    found = planned(*arguments)
    choice: dict[str, Any] = found["candidates"][found["choice"]]
    return choice


def test_small_microbatches_decide_between_no_methods_and_no_strategies() -> None:
    """QLoRA of 32 thousand million parameters fits a 4090 two examples at a time, LN tuning four."""
    wide = chosen("--gpu", "rtx-4090-24gb", "--model", "qwen2.5-32b")
    assert (wide["method"], wide["precision"], wide["verdict"]) == ("lora", "nf4", "FITS") and wide["microbatch"] < 4
    eight, *asked = ["--gpus", "8"], "--gpu", "rtx-4090-24gb", "--model", "llama-3.1-8b"
    shared = chosen(*asked, *eight)
    assert (shared["strategy"], shared["precision"]) == ("ddp", "bf16")
    assert shared["update_seconds"] < chosen(*asked)["update_seconds"] / 4


def test_of_one_method_and_precision_the_shortest_update_is_chosen() -> None:
    """T5-11B fits an A100 an example at a time without computing activations again, and many with."""
    found = planned("--gpu", "a100-40gb", "--model", "t5-11b", "--method", "lora", "--precision", "bf16")
    kept, again = sorted(found["candidates"], key=lambda each: each["checkpointing"])
    assert kept["verdict"] == again["verdict"] == "FITS" and kept["microbatch"] < again["microbatch"]
    assert kept["update_seconds"] < again["update_seconds"] and found["candidates"][found["choice"]] == kept


def test_an_optimizer_works_on_fewer_chunks_of_a_part() -> None:
    """The update of bf16 weights is a loop over chunks, whose calls are most of its time."""
    asked = ["--gpu", "h100-80gb", "--gpus", "8", "--model", "llama-3.1-8b", "--method", "full", "--precision", "bf16"]
    seconds = {each["strategy"]: each["update_seconds"] for each in planned(*asked)["candidates"]}
    assert seconds["fsdp"] < seconds["ddp"] / 2


def test_a_choice_without_room_to_spare_says_so() -> None:
    asked = ["--model", "llama-3.1-70b", "--gpu", "a100-40gb"]
    assert chosen(*asked)["verdict"] == "TIGHT"
    for more in ([], ["--markdown"]):
        shown = " ".join(plan(*asked, *more).stdout.split())
        assert "It is TIGHT" in shown and ("→ TIGHT" in shown or more) and "reserved" in shown


def test_markdown_has_the_bytes_by_kind() -> None:
    shown = plan("--gpu", "a100-40gb", "--model", "llama-3.1-8b", "--markdown").stdout
    head, rule, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert "| activations |" in head and rows and {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert "microbatches of 4, which take" in shown


def test_more_memory_never_fits_less() -> None:
    asked = ["--gpu", "rtx-4090-24gb", "--model", "qwen2.5-14b", "--method", "houlsby", "--precision", "int8"]
    sizes = [chosen(*asked, "--reserve", str(reserve))["microbatch"] for reserve in (2, 1.5, 1, 0.5, 0)]
    assert sizes == sorted(sizes)


def test_a_choice_says_what_a_run_of_it_takes() -> None:
    asked = ["--gpu", "a100-40gb", "--model", "llama-3.1-8b"]
    found = chosen(*asked)
    assert found["run_microbatch"] == 4 < found["microbatch"]
    assert found["run_process_bytes"] < found["process_bytes"]
    assert "microbatches of 4, which take 28.0 GiB" in " ".join(plan(*asked).stdout.split())


def test_what_would_fit_is_what_would_be_chosen_there() -> None:
    with pytest.raises(EdgePeftError) as caught:
        plan("--gpu", "rtx-4090-24gb", "--model", "llama-3.1-8b", "--method", "full", "--precision", "bf16")
    assert "--method lora --precision bf16" in caught.value.remedy
    with pytest.raises(EdgePeftError) as caught:
        plan("--gpu", "jetson-orin-nano-8gb", "--model", "phi-4")
    assert "rtx-3060-12gb with lora on nf4" in caught.value.remedy


def test_flags_say_something_or_are_refused() -> None:
    with pytest.raises(UsageError, match="--target-len is about answers"):
        plan("--gpu", "a100-40gb", "--model", "llama-3.1-8b", "--target-len", "50")
    shown = plan("--model", "llama-3.1-8b", "--all-gpus", "--examples", "50000").stdout
    assert " h " in next(line for line in shown.splitlines() if line.startswith("l4-24gb"))
    assert "multiplies no bf16" in plan("--gpu", "t4-16gb", "--model", "gpt2", "--precision", "bf16").stdout


def test_hours_follow_from_the_data_and_the_time_of_an_update(tiny: Path) -> None:
    arguments = ["--model", str(tiny), "--gpu", "t4-16gb", "--method", "lst", "--precision", "fp32"]
    found = json.loads(plan(*arguments, "--global-batch", "8", "--examples", "1001", "--epochs", "2", "--json").stdout)
    candidate = found["candidates"][found["choice"]]
    assert found["updates"] == 2 * 126
    assert candidate["job"]["hours"] == pytest.approx(252 * candidate["update_seconds"] / 3600)
    assert candidate["tokens_per_second"] == pytest.approx(8 * 64 / candidate["update_seconds"])
    assert "estimated" in found["times"]
    assert "Estimated for the job: 252 updates" in plan(*arguments, "--global-batch", "8", "--examples", "2010").stdout


def candidate(method: str, microbatch: int, fits: bool = True) -> Candidate:
    return Candidate(
        method=method,
        precision="nf4",
        microbatch=microbatch,
        checkpointing=microbatch > 9,
        fits=fits,
        verdict="FITS" if fits else "NO",
        peak_bytes=1,
        reserved_bytes=1,
        process_bytes=1,
        least_bytes=1,
        phase="update",
        bytes={},
        phases={},
    )


def test_a_map_says_what_fits_and_what_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (
        Plan(
            hardware=replace(hardware.load(name), watts=300.0),
            model="m",
            task="causal-lm",
            candidates=candidates,
            choice=None,
            why="",
        ).as_json()
        for name, candidates in (
            ("t4-16gb", (candidate("lora", 3), candidate("full", 1, fits=False))),
            ("a100-80gb", (candidate("lora", 40), candidate("full", 2), candidate("ia3", 1))),
        )
    )
    tables.machines([large, small])
    head, first, second = capsys.readouterr().out.splitlines()[1:4]
    assert head.split() == ["machine", "free", "lora", "full", "ia3"]
    assert first.split() == ["t4-16gb", "14.4", "GiB", "3", "nf4", "NO", "–"]
    assert second.split() == ["a100-80gb", "78.6", "GiB", "40", "nf4+", "2", "nf4", "1", "nf4"]


def test_a_narrow_terminal_shows_the_bytes_by_kind_too() -> None:
    held = {"weights": 3 * 2**30, "activations": 5 * 2**29, "adapter": 0}
    found = Plan(
        hardware=hardware.load("t4-16gb"),
        model="m",
        task="causal-lm",
        candidates=(replace(candidate("lora", 12), bytes=held, process_bytes=6 * 2**30, update_seconds=0.25),),
        choice=0,
        why="",
    )
    page = StringIO()
    Console(file=page, width=80).print(planpage.narrow(found, "title"))
    shown = page.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    for part in ("→", "FITS", "lora", "nf4+", "12", "6.00", "0.25", "weights 3.00", "activations", "2.50", "in update"):
        assert part in shown
    assert "adapter" not in shown


def test_progress_is_told_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show = tables.progress("tracing")
    show(1, 4)
    assert not capsys.readouterr().err, "not at once"
    monkeypatch.setattr(tables, "SILENT_SECONDS", -1.0)
    show(2, 4)
    told = capsys.readouterr()
    assert told.err == "tracing 2/4\n" and not told.out


@pytest.mark.parametrize("kind", ["mamba", "mixtral", "vit"])
def test_an_architecture_that_is_not_known_is_refused_before_anything_is_traced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    monkeypatch.setattr(traces, "find", lambda *anything: pytest.fail("it is traced"))
    with pytest.raises(UsageError, match=f"(?i){kind}"):
        plan("--model", str(tmp_path), "--gpu", "t4-16gb")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "lora", "--set", "options.targets=foo"], "no target 'foo'"),
        (["--method", "lora", "--set", "options.rank=5000", "--set", "options.rank=6000"], "rank = 5000"),
        (["--task", "causal-lm"], "not trained for causal-lm here"),
    ],
)
def test_what_a_listed_model_cannot_do_is_refused_before_anything_is_traced(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "find", lambda *anything: pytest.fail("it is traced"))
    with pytest.raises(UsageError, match=told):
        plan("--model", "t5-base", "--gpu", "t4-16gb", *arguments)


def test_what_only_some_precisions_or_values_allow_is_planned(tiny: Path) -> None:
    asked = ["--model", str(tiny), "--gpu", "t4-16gb", "--method", "lora"]
    found = planned(*asked, "--set", "options.loftq=1")
    assert {each["precision"] for each in found["candidates"]} == {"nf4", "int8"}
    found = planned(*asked, "--precision", "fp32", "--set", "options.rank=4", "--set", "options.rank=5000")
    assert {each["options"]["rank"] for each in found["candidates"]} == {4}
