"""Configurations of HF PEFT as methods: they compute what PEFT does, on packed layers too, or are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import peft_types
import pytest
import tiny
import torch
import training
from conformance import gradients, randomised
from torch import nn

from edgepeft import adapter, hardware, ledger, pipeline, plan, precision, taxonomy, traces
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.merge import relative_difference
from edgepeft.methods import base
from edgepeft.surface import Surface

ROOT = Path(__file__).resolve().parent.parent
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_CACHE", str(tmp_path / "traces"))


@pytest.mark.parametrize(
    ("kind", "family", "at"),
    [
        ("LORA", "llama", "nf4"),
        ("LN_TUNING", "bert", "bf16"),  # PEFT itself would train in bf16
        ("VERA", "bert", "fp32"),  # shares frozen tensors between layers
        ("WAVEFT", "llama", "int8"),  # looks for what is true in a mask
        ("TRAINABLE_TOKENS", "t5", "fp32"),  # whose embeddings are its head too
        ("PREFIX_TUNING", "t5", "fp32"),
        ("CARTRIDGE", "llama", "fp32"),  # has a random part that is not trained
        ("MULTITASK_PROMPT_TUNING", "bert", "fp32"),
    ],
)
def test_a_type_goes_through_all_that_a_run_does(kind: str, family: str, at: str, tmp_path: Path) -> None:
    why = peft_types.goes_through(kind, family, at, tmp_path)
    assert bool(why) == (kind in ("PREFIX_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_TUNING"))


def test_the_page_names_every_type_of_the_installed_peft() -> None:
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    assert f"with peft {peft.__version__}." in page, "run tools/peft_page.py"
    assert tuple(re.findall(r"^\| ([A-Z0-9_]+) \|", page, re.MULTILINE)) == peft_types.TYPES
    assert "FAILS" not in page


@pytest.mark.parametrize("at", ["nf4", "int8"])
def test_gradients_through_packed_layers_are_those_of_their_weights(at: str, tmp_path: Path) -> None:
    method = base.create(peft_types.write(tmp_path, {**LORA, "target_modules": "all-linear"}))
    made = tiny.load("llama", at)
    base.complete(method, made)
    packed = made.model.float()
    randomised(packed)
    batch = tiny.batch("llama")
    sample_logits(packed.eval(), [batch])  # after which bitsandbytes' own layers have wrong gradients on some CPUs
    packed.train()
    plain = copy.deepcopy(packed)
    with precision.emulating(bf16=False):  # or the weights would be rounded
        precision.unpack(plain, torch.float32)
    assert any(isinstance(module, precision.StoredLinear) for module in packed.modules())
    expected, found = gradients(plain, batch), gradients(packed, batch)
    assert expected.keys() == found.keys() and len(found) == 2 * 14
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_type_that_reads_the_weights_reads_what_packed_layers_multiply_with(tmp_path: Path) -> None:
    method = base.create(peft_types.write(tmp_path, peft_types.fields("OFT", "llama")))
    made = tiny.load("llama", "nf4")
    base.complete(method, made)
    randomised(made.model.float())
    before = sample_logits(made.model, [tiny.batch("llama")])
    precision.unpack(made.model, torch.float32)
    assert relative_difference(before, sample_logits(made.model, [tiny.batch("llama")])) < 0.02  # bf16's rounding


def test_modules_to_save_and_biases_are_trained_and_peft_reads_them(tmp_path: Path) -> None:
    content = {
        **{"peft_type": "LORA", "target_modules": ["query"], "bias": "lora_only"},
        "modules_to_save": ["classifier", "score", "word_embeddings"],
    }
    method = base.create(peft_types.write(tmp_path / "configuration", content))
    made = tiny.load("bert")
    base.complete(method, made)
    randomised(made.model)
    card = adapter.card(method, model="tiny", task=made.task, precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "adapter", made.model, card)
    theirs = peft.PeftModel.from_pretrained(tiny.load("bert").model, str(tmp_path / "adapter")).eval()
    batch = tiny.batch("bert")
    with torch.no_grad():
        expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert relative_difference([expected], [found]) < 1e-5
    assert sum(name.endswith("base_layer.bias") for name in adapter.trained(made.model)) == 2


def test_a_file_that_peft_wrote_is_taken_with_all_its_defaults(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, inference_mode=True)
    config.save_pretrained(str(tmp_path))
    made = tiny.load("llama")
    base.complete(base.create(f"peft:{tmp_path / 'adapter_config.json'}"), made)
    assert len(adapter.trained(made.model)) == 2 * 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "no peft_type"),
        ({"r": 4}, "no peft_type"),
        ({"peft_type": "LORAA"}, "LORA"),
        ({**LORA, "rank": 4}, "has no 'rank' for LORA"),
        ({**LORA, "r": -1}, "positive integer"),
        ({**LORA, "r": -1}, "Correct r in "),
        ({**LORA, "r": "x"}, 'r cannot be "x".\nIt must be a whole number.'),
        ({**LORA, "r": 8.5}, "r cannot be 8.5"),
        ({**LORA, "lora_alpha": "x"}, 'lora_alpha cannot be "x"'),
        ({**LORA, "lora_dropout": None}, "lora_dropout cannot be null.\nIt must be a number."),
        ({**LORA, "rank_pattern": {"q_proj": "x"}}, "rank_pattern cannot be"),
        ({**LORA, "target_modules": [1]}, "It must be a list (a text each) or a text or null."),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": -3}, "num_virtual_tokens cannot be -3"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens cannot be null"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "x"}, 'num_virtual_tokens cannot be "x"'),
        ({**LORA, "target_modules": ["wrong"]}, "q_proj"),
        ({**LORA, "target_modules": ["lm_head"]}, "predicts tokens"),
        ({**LORA, "modules_to_save": ["wrong"]}, "no such module"),
        ({**LORA, "task_type": "SEQ_CLS"}, "--task"),
        ({**LORA, "task_type": "NOTHING"}, "Invalid task type"),
        ({**LORA, "init_lora_weights": "eva"}, "computed from data"),
        ({**LORA, "megatron_config": {"a": 1}, "megatron_core": "os"}, "imports a module"),
        ({**LORA, "layer_replication": [[0, 2], [1, 2]]}, "depth"),
        ({"peft_type": "ADALORA", "total_step": 9}, "--method adalora"),
        ({"peft_type": "ADAMSS", "target_modules": ["q_proj"]}, "Installing scikit-learn does not help."),
        (
            {
                **{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT"},
                **{"prompt_tuning_init_text": "a", "tokenizer_name_or_path": "x"},
                "tokenizer_kwargs": {"trust_remote_code": True},
            },
            "not run",
        ),
    ],
)
def test_what_does_not_fit_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        base.complete(base.create(f"peft:{path}"), tiny.load("llama"))
    assert told in str(refused.value)


def test_options_missing_files_and_a_missing_peft_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        base.create(f"peft:{tmp_path}")
    name = peft_types.write(tmp_path, LORA)
    with pytest.raises(UsageError, match="takes no options"):
        base.create(name, {"r": 8})
    with pytest.raises(UsageError, match="describe"):
        taxonomy.describe(base.find(name))
    monkeypatch.setitem(__import__("sys").modules, "peft.mapping", None)
    with pytest.raises(UsageError, match=r"edgepeft\[peft\]"):
        base.create(name)


@pytest.mark.parametrize("start", ["pissa", "OLoRA"])
def test_a_change_of_the_backbone_is_refused_on_packed_weights_before_anything_is_traced(
    start: str, tmp_path: Path
) -> None:
    name = peft_types.write(tmp_path, {**LORA, "init_lora_weights": start})
    assert traces.traits(name).writes_backbone
    with pytest.raises(UsageError, match="nf4"):
        base.create(name).check("nf4")
    base.complete(base.create(name), tiny.load("llama"))


def test_the_plan_depends_on_what_the_file_says(tmp_path: Path) -> None:
    peaks = []
    for rank in (4, 16):
        name = peft_types.write(tmp_path, {**LORA, "r": rank})
        found = peft_types.planned(name, "llama")
        assert not isinstance(found, EdgePeftError)
        peaks.append(sum(found.at(1, ("forward+backward", "update"))[1].values()))
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, True),
        ({"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 8}}, True),
        ({"target_modules": r".*layers\.1\..*q_proj"}, True),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, True),
    ],
)
def test_what_tells_layers_apart_is_traced_as_a_whole(given: dict[str, Any], whole: bool, tmp_path: Path) -> None:
    method = base.create(peft_types.write(tmp_path, {"peft_type": "LORA", "r": 2, **given}))
    assert (method.depths() == base.WHOLE) == whole


def test_checkpointing_is_not_planned_where_its_layers_would_miss_something(tmp_path: Path) -> None:
    for kind, recomputes in (("PREFIX_TUNING", False), ("POLY", False), ("VBLORA", True)):
        name = peft_types.write(tmp_path / kind, peft_types.fields(kind, "llama"))
        assert traces.traits(name).backpropagates == recomputes
    assert isinstance(peft_types.planned(name, "llama", checkpointing=True, cuda=True, bf16=True), Surface)


def test_a_prompt_is_trained_and_an_export_of_it_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", peft_types.fields("PROMPT_TUNING", "bert"))
    chosen = training.written("classification", method=name, options={}, max_steps=2)
    with pytest.raises(UsageError, match="edgepeft train"):
        pipeline.run(dataclasses.replace(chosen, data="nowhere.jsonl"), tmp_path / "run")
    lines: list[str] = []
    pipeline.run(chosen, tmp_path / "run", until="train", say=lines.append)
    assert any("not exported to ONNX" in line for line in lines)
    with pytest.raises(UsageError, match="edgepeft train"):
        pipeline.run(chosen, tmp_path / "run")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "POLY"])
def test_what_checkpointing_would_lose_is_said_before_the_data_is_read(kind: str, tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", peft_types.fields(kind, "llama"))
    chosen = training.written("causal-lm", method=name, options={}, checkpointing=True, data="nowhere.jsonl")
    with pytest.raises(UsageError, match="takes it away before backward"):
        pipeline.run(chosen, tmp_path / "run")
    found = {"model": tiny.configuration("llama").to_dict(), "task": "causal-lm", "name": "tiny", "tokens": 16}
    with pytest.raises(UsageError, match="takes it away before backward"):
        plan.plan(**found, hardware=hardware.load("auto"), methods=[name], checkpointing=True)


def test_an_adaption_prompt_is_refused_on_packed_weights_and_on_models_that_peft_does_not_know(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "llama", peft_types.fields("ADAPTION_PROMPT", "llama"))
    with pytest.raises(UsageError, match="packed weights are none"):
        base.create(name).check("int8")
    with pytest.raises(UsageError, match=r"Unsupported model type[\s\S]*docs/peft.md"):
        base.complete(base.create(name), tiny.load("bert"))


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", {**LORA, "lora_dropout": 0.2, "use_dora": True})
    chosen = training.written("causal-lm", method=name, options={})
    training.run(chosen, tmp_path / "whole")
    training.dies(training.run_until_killed, chosen, tmp_path / "killed", 12, 0)
    training.run(chosen, tmp_path / "killed")
    assert training.result(tmp_path / "killed") == training.result(tmp_path / "whole")


def test_a_run_is_of_one_configuration(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", LORA)
    chosen, out = training.written("causal-lm", method=name, options={}), tmp_path / "run"
    pipeline.run(chosen, out, until="merge")
    pipeline.run(chosen, out, until="merge")
    rows = {row.artefact: row for row in ledger.read(out / "ledger.json")}
    assert rows["merged-fp32"].deviation is not None and rows["merged-fp32"].deviation < 1e-5
    peft.PeftModel.from_pretrained(tiny_of(chosen.model), str(out / "adapter"))
    peft_types.write(tmp_path / "configuration", {**LORA, "lora_alpha": 32})
    with pytest.raises(UsageError, match="PEFT's configuration"):
        pipeline.run(chosen, out, until="merge")


def tiny_of(folder: str) -> nn.Module:
    """A stored tiny model as transformers loads it."""
    import transformers

    found: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return found


def test_what_cannot_be_merged_goes_to_the_device_beside_its_backbone(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", peft_types.fields("BEFT", "llama"))
    lines: list[str] = []
    space = pipeline.run(
        training.written("causal-lm", method=name, options={}, variants=()), tmp_path / "run", say=lines.append
    )
    assert any("stays beside its backbone" in line for line in lines)
    assert not space.merged.exists() and (space.device / "model.onnx").exists()


def test_what_depends_on_the_rest_of_a_batch_is_not_exported(tmp_path: Path) -> None:
    name = peft_types.write(tmp_path / "configuration", peft_types.fields("LILY", "bert"))
    with pytest.raises(UsageError, match="cannot be exported to ONNX") as caught:
        pipeline.run(training.written("classification", method=name, options={}, variants=()), tmp_path / "run")
    assert "what else is in the batch" in caught.value.cause and not (tmp_path / "run").exists()
    made, method = tiny.adapted("bert", name)
    randomised(made.model)
    batch = {key: value for key, value in tiny.batch("classification").items() if key != "labels"}
    with torch.no_grad():
        together = made.model.eval()(**batch).logits
        alone = made.model(**{key: value[:1] for key, value in batch.items()}).logits
    assert (together[:1] - alone).abs().max() > 1e-4 * together.abs().max()  # 1e-7 is what rounding does
