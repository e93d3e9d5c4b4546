"""Folders that are no model, or a damaged or unknown one: refused by name, before or instead of loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_tokenizers
import transformers
from safetensors.torch import load_file, save_file

from edgepeft import backbone
from edgepeft.errors import EdgePeftError, UsageError


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "damaged"))


def test_truncated_weights(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(EdgePeftError, match="are damaged"):
        backbone.load(backbone.resolve(str(damaged)), task="causal-lm", at="fp32")


def test_no_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="could not be loaded") as caught:
        backbone.load(backbone.resolve(str(damaged)), task="causal-lm", at="fp32")
    assert "model.safetensors" in caught.value.cause


def test_weights_of_a_layer_are_missing(damaged: Path) -> None:
    """transformers would fill them at random."""
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgePeftError, match="are not whole") as caught:
        backbone.load(backbone.resolve(str(damaged)), task="causal-lm", at="fp32")
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.cause


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight"),
        ("bert", "bert.embeddings.LayerNorm.bias"),
        ("bert", "bert.encoder.layer.0.output.dense.weight"),
        ("distilbert", "distilbert.embeddings.position_embeddings.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("at", ["fp32", "nf4"])
def test_a_classifier_is_not_made_on_a_backbone_with_holes(family: str, lost: str, at: str, tmp_path: Path) -> None:
    """They would start at random, and every method would train them as it does a new head."""
    with pytest.raises(EdgePeftError, match="are not whole") as caught:
        backbone.load(_without(lost, family, tmp_path), task="classification", at=at, labels=["a", "b"])
    assert f"such as {lost}." in caught.value.cause


def test_a_classifier_may_lack_what_sits_on_its_backbone(tmp_path: Path) -> None:
    """BERTs that were trained without sentence pairs come without a pooler."""
    made = backbone.load(_without("bert.pooler.", "bert", tmp_path), task="classification", at="fp32")
    made_anew = ("bert.pooler.dense", "classifier")
    assert made.fresh == {f"{part}.{leaf}" for part in made_anew for leaf in ("weight", "bias")}


def _without(prefix: str, family: str, home: Path) -> backbone.Source:
    """A family's checkpoint without the tensors of this prefix."""
    folder = Path(shutil.copytree(tiny.folder(family), home / "holed"))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return backbone.resolve(str(folder))


def test_weights_of_another_width(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(EdgePeftError, match="are not whole") as caught:
        backbone.load(backbone.resolve(str(damaged)), task="causal-lm", at="fp32")
    assert "6 tensors" in caught.value.cause


def test_an_architecture_that_is_code_is_refused_without_running_it(damaged: Path) -> None:
    fields = json.loads((damaged / "config.json").read_text())
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    (damaged / "config.json").write_text(json.dumps({**fields, "model_type": "own", "auto_map": names}))
    (damaged / "own.py").write_text("raise SystemExit('it ran')")
    for trusted in (False, True):
        with pytest.raises(UsageError, match="is code in its repository"):
            backbone.config(backbone.resolve(str(damaged)), trust_remote_code=trusted)


def test_a_tokenizer_that_is_code_says_how_it_is_trusted(damaged: Path) -> None:
    tiny_tokenizers.byte_level().save_pretrained(damaged)
    fields = json.loads((damaged / "tokenizer_config.json").read_text())
    fields |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (damaged / "tokenizer_config.json").write_text(json.dumps(fields))
    (damaged / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UsageError) as caught:
        backbone.tokenizer(backbone.resolve(str(damaged)))
    assert "--set trust_remote_code=true" in caught.value.remedy


def test_a_model_type_that_transformers_does_not_know(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"model_type": "llamma"}))
    with pytest.raises(UsageError, match="could not be loaded") as caught:
        backbone.config(backbone.resolve(str(damaged)))
    assert "llamma" in caught.value.cause


def test_a_config_that_is_not_json(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    with pytest.raises(UsageError, match="could not be loaded"):
        backbone.config(backbone.resolve(str(damaged)))


def test_a_folder_without_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="has a model, but no tokenizer"):
        backbone.tokenizer(backbone.resolve(str(tiny.folder("llama"))))


def test_a_tokenizer_comes_with_its_folder(damaged: Path) -> None:
    tiny_tokenizers.byte_level().save_pretrained(damaged)
    assert backbone.tokenizer(backbone.resolve(str(damaged))).is_fast


@pytest.mark.parametrize(
    ("packed", "by"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_weights_that_are_quantised_already_are_refused(damaged: Path, packed: dict[str, object], by: str) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | packed))
    with pytest.raises(UsageError, match=f"already quantised, by {by}") as caught:
        backbone.config(backbone.resolve(str(damaged)))
    assert "--precision nf4" in caught.value.remedy


@pytest.mark.parametrize("field", ["max_position_embeddings", "intermediate_size"])
@pytest.mark.parametrize("value", [-5, 10**12])
def test_sizes_that_no_model_has_are_refused_by_name(damaged: Path, field: str, value: int) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UsageError, match="describes no model") as caught:
        backbone.config(backbone.resolve(str(damaged)))
    assert f"{field} is {value}" in caught.value.cause


@pytest.mark.parametrize(
    ("kind", "reads", "instead"),
    [
        ("gemma3", "text and images", "gemma-3-1b"),
        ("gemma3n", "text and images and sound", "gemma-3-1b"),
        ("qwen2_5_vl", "text and images", "qwen2.5"),
        ("mistral3", "text and images", "mistral-7b"),
        ("llama4", "text and images", "llama-3"),
        ("llava", "text and images", "llama-3"),
    ],
)
def test_a_model_of_more_than_text_is_called_that(tmp_path: Path, kind: str, reads: str, instead: str) -> None:
    transformers.CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        backbone.config(backbone.resolve(str(tmp_path)))
    assert f"is a model of {reads} ({kind})" in caught.value.fact and instead in caught.value.remedy
