"""The command line as a user types it: exit codes, messages without tracebacks, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft import __version__, cli

ROOT = Path(__file__).parents[1]
MINILM, DATA = ROOT / "models" / "minilm-l6", ROOT / "data" / "sentiment"


def edgepeft(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepeft.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
    )


def refused(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_profiles_answers_without_torch() -> None:
    result = edgepeft("profiles", "--json")
    assert {profile["name"] for profile in json.loads(result.stdout)} >= {"a100-40gb", "raspberry-pi-5-8gb", "t4-16gb"}
    code = "import sys, edgepeft.cli, edgepeft.tables, edgepeft.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_as_json() -> None:
    found = {method["name"]: method for method in json.loads(edgepeft("methods", "--json").stdout)}
    assert found["lst"]["merges"] is False and found["lora"]["kind"] == "reparametrised"
    assert all(method.keys() == {"name", "kind", "merges", "paper"} for method in found.values())
    options = json.loads(edgepeft("methods", "lora", "--json").stdout)["options"]
    assert all(option["meaning"] for option in options)


def test_a_terminal_without_the_characters_of_tables_is_no_error() -> None:
    result = edgepeft("methods", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "lora" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plan", "--model", "t5-12b", "--gpu", "t4-16gb"], ["no model 't5-12b'", "t5-11b"]),
        (["plan", "--model", "t5-11b", "--gpu", "t4"], ["no hardware profile", "t4-16gb"]),
        (["plan", "--model", "t5-11b", "--gpu", "t4-16gb", "--method", "lorra"], ["no method 'lorra'", "lora"]),
        (["plan", "--model", "gpt2", "--gpu", "t4-16gb", "--seq-len", "5000"], ["cannot read 5000", "1024"]),
        (["run", "--model", "minilm-l6", "--out", "out"], ["data is missing"]),
        (["run", "--model", MINILM, "--data", "none.jsonl", "--out", "out"], ["no file or folder none.jsonl"]),
        (["run", "--model", MINILM, "--data", DATA, "--out", "out", "--set", "lrr=1"], ["no 'lrr'", "lr"]),
        (["run", "--model", MINILM, "--data", DATA, "--out", "out", "--seq-len", "600"], ["cannot read 600", "512"]),
        (
            ["plan", "--model", MINILM, "--method", "prompt_tuning", "--set", "options.length=512"],
            ["no room", "takes 512 positions", "the model has 512"],
        ),
        (
            ["run", "--model", MINILM, "--data", DATA, "--out", "out", "--gpu", "a100-40gb"],
            ["no CUDA device", "to run here, --set hardware=auto"],
        ),
        (
            ["train", "--model", MINILM, "--data", DATA, "--out", "out", "--gpu", "cpu-x86-16gb", "--gpus", "2"],
            ["is not a GPU", "Leave it out, or share the cores among 2 processes: --set devices=2"],
        ),
        (
            ["run", "--model", MINILM, "--data", DATA, "--out", "out", "--method", "qlora", "--precision", "bf16"],
            ["means nf4"],
        ),
        (["merge", "nowhere"], ["no run in nowhere"]),
        (["infer", "nowhere", "text"], ["nowhere"]),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(edgepeft(*arguments), 2, *parts)


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "x"}\n{"text": "bad" "label": "y"}\n')
    refused(edgepeft("run", "--model", MINILM, "--data", rows, "--out", tmp_path / "out"), 2, "rows.jsonl, line 2")


@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_is_not_trained_yet_is_not_merged_or_exported(command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'model = "{MINILM}"\ndata = "{DATA}"\nmethod = "lora"\n')
    refused(edgepeft(command, tmp_path), 2, "is not trained to its end", "edgepeft train --recipe")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("command", ["merge", "export"])
def test_what_training_settled_is_not_set_afterwards(command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'model = "{MINILM}"\ndata = "{DATA}"\nmethod = "lora"\nseed = 3\n')
    (tmp_path / "adapter").mkdir()
    settings = ["--set", "lr=0.1", "--set", "variants=int4", "--set", "seed=3", "--set", "options.rank=2"]
    refused(edgepeft(command, tmp_path, *settings), 2, "is trained; lr, options cannot change", "train another run")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "recipe.toml"}


@pytest.mark.parametrize("more", [[], ["--data", DATA]])
def test_a_run_that_is_not_trained_yet_has_no_adapter_to_convert(more: list[str], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "recipe.toml").write_text(f'model = "{MINILM}"\ndata = "{DATA}"\nmethod = "lora"\n')
    refused(edgepeft("adapter", run, out, *more), 2, "is not trained to its end", f"--recipe {run}/recipe.toml")
    assert not out.exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    refused(edgepeft("run", "--model", MINILM, "--data", DATA, "--out", tmp_path), 2, "holds no run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_galore_refuses_accumulation(tmp_path: Path) -> None:
    arguments = ["--method", "galore", "--precision", "fp32", "--seq-len", "32", "--set", "microbatch=4"]
    result = edgepeft("run", "--model", MINILM, "--data", DATA, "--out", tmp_path / "out", *arguments)
    refused(result, 2, "galore cannot accumulate gradients", "Set global_batch")


def test_plan_exits_with_1_when_nothing_fits(tmp_path: Path) -> None:
    profile = tmp_path / "toy.toml"
    profile.write_text(
        'kind = "cuda"\ntitle = "Toy"\nmemory_bytes = 500_010_000\nreserved_bytes = 500_000_000\n'
        'bandwidth = 1e11\nproviders = ["CPUExecutionProvider"]\n[flops]\nfp32 = 1e12\nbf16 = 2e12\n'
    )
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--model", tmp_path, "--gpu", profile, "--method", "ln_tuning", "--precision", "nf4"]
    refused(edgepeft("plan", *arguments, EDGEPEFT_CACHE=str(tmp_path)), 1, "does not fit", "What would: ")
    found = edgepeft("plan", *arguments, "--json", EDGEPEFT_CACHE=str(tmp_path))
    answer = json.loads(found.stdout)
    assert found.returncode == 1 and answer["choice"] is None
    assert {"hardware"} in [way["change"].keys() for way in answer["alternatives"]]
    assert all(way["text"] and way["least_bytes"] > 0 for way in answer["alternatives"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            PermissionError(13, "Permission denied", "/out"),
            "/out cannot be used.\nPermission denied.\nChoose another path.",
        ),
        (OSError("The file is corrupt."), "A file cannot be used.\nThe file is corrupt.\nCheck disk and network."),
        (OSError(5, "Input/output error"), "A file cannot be used.\nInput/output error.\nCheck disk and network."),
    ],
)
def test_what_the_system_refuses_is_told(
    error: OSError, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.strip() == told


def test_the_version_is_told() -> None:
    assert edgepeft("--version").stdout.strip() == __version__


def test_measuring_takes_no_setting_that_it_would_ignore() -> None:
    refused(
        edgepeft("measure", "--model", "gpt2", "--method", "lora", "--set", "rank=4"), 2, "and not rank", "options."
    )


def test_an_unknown_precision_is_refused_before_work() -> None:
    arguments = (
        "--model",
        ROOT / "models" / "t5-tiny",
        "--data",
        "nowhere.jsonl",
        "--out",
        "nowhere",
        "--precision",
        "fp16",
    )
    refused(edgepeft("train", *arguments), 2, "'fp16' is not known", "bf16")
