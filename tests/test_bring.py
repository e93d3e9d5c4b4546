"""An adapter that was trained elsewhere is a run: merged, exported and measured like one that was trained here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import training
import transformers
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from edgepeft import adapter, cli, ledger
from edgepeft.errors import UsageError

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def edgepeft(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], catch_exceptions=True)


def test_an_adapter_of_peft_s_becomes_a_run_that_is_merged(tmp_path: Path) -> None:
    source = training.source("causal-lm")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source / "model")
    theirs = peft.get_peft_model(plain, peft.LoraConfig(**LORA))
    tiny.randomise(nn.ParameterList(p for p in theirs.parameters() if p.requires_grad), seed=3)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = theirs.merge_and_unload().state_dict()

    run = tmp_path / "run"
    assert edgepeft("adapter", tmp_path / "theirs", run, "--data", source / "data.jsonl").exit_code == 0
    for _ in range(2):
        assert (done := edgepeft("merge", run)).exit_code == 0, done.exception
    found = load_file(run / "merged" / "model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    rows = {row.artefact: row for row in ledger.read(run / "ledger.json")}
    assert [*rows] == ["base", "adapter", "merged-fp32"]
    assert rows["base"].metrics != rows["adapter"].metrics
    assert rows["adapter"].metrics["loss"] == pytest.approx(rows["merged-fp32"].metrics["loss"], rel=1e-5)
    assert not (run / "checkpoints").exists()


def test_the_classes_of_an_adapter_must_be_those_of_the_data(tmp_path: Path) -> None:
    source, run = training.source("classification"), tmp_path / "trained"
    training.run(training.written("classification", max_steps=1), run)
    card = json.loads((run / "adapter" / "adapter.json").read_text(encoding="utf-8"))
    for labels, told in ((["long", "longer", "LABEL_2"], "classes are"), (["LABEL_0", "LABEL_1", "LABEL_2"], "")):
        (run / "adapter" / "adapter.json").write_text(json.dumps({**card, "labels": labels}), encoding="utf-8")
        brought = tmp_path / f"brought-{told or 'unnamed'}"
        assert edgepeft("adapter", run, brought, "--data", source / "data.jsonl").exit_code == 0
        done = edgepeft("merge", brought)
        if told:
            assert isinstance(done.exception, UsageError) and told in str(done.exception)
        else:
            assert done.exit_code == 0 and "does not name its classes" in done.stderr


def test_what_peft_trained_in_its_own_layers_is_not_brought(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    card = {"method": "peft:x", "options": {}, "model": "m", "task": "causal-lm", "precision": "fp32"}
    for name, content in (("adapter.json", {**card, "labels": None, "seed": 0}), ("adapter_config.json", {})):
        (tmp_path / "adapter" / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "adapter" / "adapter.safetensors").touch()
    refused = edgepeft("adapter", tmp_path / "adapter", tmp_path / "run", "--data", "data.jsonl").exception
    assert isinstance(refused, UsageError) and "edgepeft merge RUN" in str(refused)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "row", "needs"),
    [
        ("classification", {"prompt": "a", "completion": "b"}, "a classifier's; give data with text and label."),
        ("classification", {"review": "a", "stars": "b"}, "a classifier's; give data with text and label."),
        ("causal-lm", {"text": "a", "label": "b"}, "give data with prompt and completion, messages or text."),
        ("seq2seq", {"prompt": "a", "completion": "b"}, "give data with input and target."),
        ("causal-lm", {"prompt": "a", "completion": "b", "messages": [{}]}, "language model's; give data with prompt"),
    ],
)
def test_data_of_another_task_is_refused_with_what_the_adapter_needs(
    task: str, row: dict[str, Any], needs: str, tmp_path: Path
) -> None:
    """`edgepeft adapter` has neither --task nor --set."""
    folder = tmp_path / "adapter"
    tuned, method = tiny.adapted("llama", "lora")
    adapter.save(folder, tuned.model, adapter.card(method, model="m", task=task, precision="fp32", labels=None, seed=0))
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    refused = edgepeft("adapter", folder, tmp_path / "run", "--data", tmp_path / "data.jsonl").exception
    assert isinstance(refused, UsageError) and needs in refused.remedy
    assert "--task" not in str(refused) and "--set" not in str(refused)


@pytest.mark.parametrize(
    ("card", "arguments", "told"),
    [
        ({}, ("--data", "nowhere.jsonl"), "There is no file or folder nowhere.jsonl."),
        ({"task": "seq2seq"}, (), "The data does not fit the task seq2seq."),
        ({"method": "lorax"}, (), "The adapter's method, 'lorax', does not come with edgepeft."),
        ({"options": {"spectral": True}}, (), "lora has no option 'spectral'."),
        ({}, ("--model", "gpt2"), "--model goes with an adapter of PEFT's."),
    ],
)
def test_what_could_not_be_merged_is_refused_at_once(
    card: dict[str, Any], arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    tuned, method = tiny.adapted("llama", "lora")
    known = adapter.card(method, model="m", task="causal-lm", precision="fp32", labels=None, seed=0)
    adapter.save(folder, tuned.model, known)
    (folder / adapter.CARD).write_text(json.dumps({**dataclasses.asdict(known), **card}), encoding="utf-8")
    data = () if "--data" in arguments else ("--data", training.source("causal-lm") / "data.jsonl")
    refused = edgepeft("adapter", folder, tmp_path / "run", *data, *arguments).exception
    assert isinstance(refused, UsageError) and refused.fact == told and refused.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [True, False])
def test_a_card_runs_no_code(data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dotted paths are found in the current folder, where people unpack what they downloaded."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "payload"
    tuned, method = tiny.adapted("llama", "lora")
    card = adapter.card(method, model="m", task="causal-lm", precision="fp32", labels=None, seed=0)
    adapter.save(folder, tuned.model, dataclasses.replace(card, method="payload.evil"))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('was-run').touch()\n", encoding="utf-8")
    more = ("--data", training.source("causal-lm") / "data.jsonl") if data else ()
    refused = edgepeft("adapter", folder, tmp_path / "new", *more).exception
    assert not (tmp_path / "was-run").exists()
    assert isinstance(refused, UsageError) and "'payload.evil', does not come with edgepeft" in str(refused)
    assert not (tmp_path / "new").exists()
