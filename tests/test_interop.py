"""HF PEFT computes the same with an adapter that was written for it, and edgepeft with one that PEFT wrote."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from conformance import randomised
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from edgepeft import adapter, backbone, cli, interop
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.interop.folder import FORMS
from edgepeft.merge import relative_difference
from edgepeft.methods import base
from edgepeft.peft_config import FILE as CONFIG
from edgepeft.peft_config import WEIGHTS
from edgepeft.placements.kronecker import split
from edgepeft.step import inputs

FAMILIES = ("llama", "gpt2", "bert", "t5")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 3, "alpha": 5.0}),
    ("lora", {"rank": 3, "alpha": 5.0, "rank_stabilised": True, "targets": ("query", "key", "value"), "dropout": 0.1}),
    ("dora", {"rank": 3, "alpha": 5.0}),
    ("adalora", {"rank": 3, "budget": 2, "alpha": 5.0}),
    ("ia3", {}),
    ("ln_tuning", {}),
    ("krona", {"scale": 0.5}),
    ("krona", {"rank": 2}),
    ("krona", {"rank": 5, "targets": ("ffn_in", "ffn_out")}),
    ("glora", {"rank": 2}),
    ("glora", {"rank": 2, "a": "vector", "b": "lowrank", "c": "scalar", "d": "none", "e": "scalar"}),
    ("glora", {"a": "scalar", "b": "none", "c": "none", "d": "vector", "e": "scalar"}),
    ("prompt_tuning", {"length": 5}),
    ("prefix_tuning", {"length": 5, "bottleneck": 8}),
]
WITHOUT = {  # what PEFT has no counterpart of, and what the refusal says
    **{("gpt2", name): f"has no {kind} for gpt2" for name, kind in (("krona", "LOKR"), ("glora", "GLORA"))},
    ("bert", "prompt_tuning"): "prompt of an encoder means something else",
    ("bert", "prefix_tuning"): "prefix of an encoder means something else",
    ("t5", "prefix_tuning"): "prefix of an encoder-decoder means something else",
}
BOTH = [(family, *case) for family in FAMILIES for case in CASES if (family, case[0]) not in WITHOUT]


def plain(family: str) -> Any:
    loader = {"classification": "SequenceClassification", "causal-lm": "CausalLM", "seq2seq": "Seq2SeqLM"}
    return getattr(transformers, f"AutoModelFor{loader[tiny.task(family)]}").from_pretrained(tiny.folder(family))


@torch.no_grad()
def logits(model: nn.Module, family: str) -> list[torch.Tensor]:
    """At the input's tokens that are no padding: PEFT gives those of a prompt as well."""
    batch = tiny.batch(family)
    found: torch.Tensor = model(**inputs(batch)).logits
    if tiny.task(family) == "causal-lm":
        found = found[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]
    return [found]


def saved(family: str, name: str, options: dict[str, Any], folder: Path, at: str = "fp32") -> list[torch.Tensor]:
    """A randomised adapter of edgepeft's, and the logits it gives."""
    made, method = tiny.adapted(family, name, at, **options)
    randomised(made.model, seed=7)
    labels = tuple(f"label-{number}" for number in range(tiny.LABELS)) if made.task == "classification" else None
    card = adapter.card(method, model=str(tiny.folder(family)), task=made.task, precision=at, labels=labels, seed=3)
    adapter.save(folder, made.model, card)
    return logits(made.model.eval(), family)


def loaded(family: str, folder: Path) -> list[torch.Tensor]:
    """The logits that edgepeft gives with an adapter."""
    card = adapter.read_card(folder)
    made = tiny.load(family)
    base.complete(base.create(card.method, card.options), made)
    adapter.load(folder, made.model)
    return logits(made.model.eval(), family)


def theirs(family: str, config: peft.PeftConfig, folder: Path) -> list[torch.Tensor]:
    """A randomised adapter that PEFT saved, and the logits it gives."""
    made = peft.get_peft_model(plain(family), config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(1 + noise if "ia3" in name or "norm" in name.lower() else noise)
    made.eval().save_pretrained(str(folder))
    return logits(made, family)


def test_ranks_that_adalora_took_away(tmp_path: Path) -> None:
    """PEFT leaves them out of the file."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, init_r=4, target_r=2, lora_alpha=6)
    made: Any = peft.get_peft_model(plain("llama"), config)
    tiny.randomise(nn.ParameterList(p for p in made.parameters() if p.requires_grad))
    layers = [name for name, module in made.base_model.model.named_modules() if hasattr(module, "lora_E")]
    kept = [[True, False, True, True], [False, False, False, True], [False] * 4]
    pattern = {f"{layer}.lora_E": kept[number % 3] for number, layer in enumerate(layers)}
    made.peft_config["default"].rank_pattern = pattern
    made.save_pretrained(str(tmp_path / "theirs"))
    assert {len(t) for n, t in load_file(tmp_path / "theirs" / WEIGHTS).items() if n.endswith("lora_E")} == {0, 1, 3}
    model = peft.PeftModel.from_pretrained(plain("llama"), tmp_path / "theirs").eval()
    interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert relative_difference(logits(model, "llama"), loaded("llama", tmp_path / "back")) < 1e-5


def test_every_form_is_tried() -> None:
    assert {name for name, _ in CASES} == set(FORMS)


@pytest.mark.parametrize(("family", "name", "options"), BOTH)
def test_peft_and_back(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(family, name, options, tmp_path / "ours")
    interop.convert(tmp_path / "ours", tmp_path / "theirs")
    model = peft.PeftModel.from_pretrained(plain(family), tmp_path / "theirs").eval()
    assert relative_difference(logits(plain(family).eval(), family), expected) > 1e-2
    assert relative_difference(expected, logits(model, family)) < 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    interop.convert(tmp_path / "saved", tmp_path / "back")
    assert relative_difference(expected, loaded(family, tmp_path / "back")) < 1e-5


PEFTS: list[tuple[str, type[peft.PeftConfig], dict[str, Any]]] = [
    ("llama", peft.LoraConfig, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", peft.LoraConfig, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "use_rslora": True}),
    ("gpt2", peft.LoraConfig, {"alpha_pattern": {"h.0.attn.c_attn": 3}, "lora_dropout": 0.1}),
    ("bert", peft.LoraConfig, {"target_modules": ["query", "intermediate.dense"], "modules_to_save": ["classifier"]}),
    ("t5", peft.LoraConfig, {"use_dora": True, "alpha_pattern": {"q": 3}, "use_rslora": True}),
    ("t5", peft.AdaLoraConfig, {"total_step": 10, "init_r": 4, "target_r": 2, "lora_alpha": 6}),
    ("llama", peft.IA3Config, {}),
    ("bert", peft.IA3Config, {}),
    ("t5", peft.IA3Config, {}),
    ("llama", peft.IA3Config, {"target_modules": ["v_proj"], "feedforward_modules": []}),
    ("llama", peft.LNTuningConfig, {}),
    ("gpt2", peft.LNTuningConfig, {}),
    ("t5", peft.LNTuningConfig, {}),
    ("llama", peft.LoKrConfig, {"target_modules": ["q_proj", "up_proj"], "r": 2, "rank_pattern": {"up_proj": 3}}),
    ("t5", peft.LoKrConfig, {"target_modules": ["q", "wo"], "r": 2, "decompose_both": True, "alpha_pattern": {"q": 3}}),
    ("llama", peft.GloraConfig, {"target_modules": ["q_proj"]}),
    ("bert", peft.GloraConfig, {"target_modules": ["key"], "config_C": "lora", "config_A_B": "vector"}),
    ("llama", peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    ("t5", peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    ("gpt2", peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    ("llama", peft.PrefixTuningConfig, {"num_virtual_tokens": 4, "prefix_projection": True}),
    ("gpt2", peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
]
KINDS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(("family", "kind", "options"), PEFTS)
def test_what_peft_trains_otherwise(
    family: str, kind: type[peft.PeftConfig], options: dict[str, Any], tmp_path: Path
) -> None:
    config = kind(task_type=KINDS[tiny.task(family)], **options)
    expected = theirs(family, config, tmp_path / "theirs")
    assert relative_difference(logits(plain(family).eval(), family), expected) > 1e-2
    interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert relative_difference(expected, loaded(family, tmp_path / "back")) < 1e-5


@pytest.mark.parametrize(("family", "name"), [*WITHOUT, ("llama", "houlsby"), ("llama", "adamix"), ("llama", "lst")])
def test_what_peft_cannot_express_is_refused(family: str, name: str, tmp_path: Path) -> None:
    saved(family, name, {}, tmp_path / "ours")
    with pytest.raises(UsageError, match=WITHOUT.get((family, name), f"{name} cannot be written for PEFT")) as refusal:
        interop.convert(tmp_path / "ours", tmp_path / "theirs")
    assert refusal.value.cause and refusal.value.remedy
    assert not (tmp_path / "theirs").exists()


def test_loftq_belongs_to_its_own_weights(tmp_path: Path) -> None:
    saved("llama", "lora", {"loftq": 1}, tmp_path / "ours", "nf4")
    with pytest.raises(UsageError, match="LoftQ cannot be written"):
        interop.convert(tmp_path / "ours", tmp_path / "theirs")


REFUSED: list[tuple[str, type[peft.PeftConfig], dict[str, Any], str]] = [
    ("llama", peft.LoHaConfig, {"target_modules": ["q_proj"]}, "kind LOHA cannot be read"),
    ("llama", peft.LoraConfig, {"bias": "all"}, "with bias = 'all' cannot be read"),
    ("llama", peft.LoraConfig, {"lora_bias": True}, "with lora_bias = True"),
    ("llama", peft.LoraConfig, {"init_lora_weights": "pissa"}, "with init_lora_weights = 'pissa'"),
    ("llama", peft.LoraConfig, {"init_lora_weights": "olora"}, "with init_lora_weights = 'olora'"),
    ("llama", peft.LoraConfig, {"layer_replication": [(0, 2), (1, 2)]}, "with layer_replication = "),
    ("llama", peft.LoraConfig, {"trainable_token_indices": [1, 2]}, "with trainable_token_indices = "),
    ("llama", peft.LoraConfig, {"target_modules": ["lm_head"]}, "changes lm_head"),
    ("llama", peft.LoraConfig, {"target_modules": ["embed_tokens"]}, "changes model.embed_tokens"),
    ("llama", peft.LoraConfig, {"modules_to_save": ["lm_head"]}, "trained lm_head as a whole"),
    ("llama", peft.LoraConfig, {"use_dora": True, "layers_to_transform": [0]}, "all layers of a role"),
    ("llama", peft.LNTuningConfig, {"target_modules": ["norm"]}, "all layers of a role"),
    ("llama", peft.LoKrConfig, {"target_modules": ["q_proj"], "decompose_factor": 2}, "with decompose_factor = 2"),
    ("gpt2", peft.IA3Config, {}, "scales what edgepeft's ia3 does not"),
    ("bert", peft.PromptTuningConfig, {"num_virtual_tokens": 4}, "prompt of an encoder means something else"),
    ("bert", peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, "prefix of an encoder means something else"),
    ("t5", peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, "prefix of an encoder-decoder means something else"),
]


@pytest.mark.parametrize(("family", "kind", "options", "message"), REFUSED)
def test_what_edgepeft_cannot_express_is_refused(
    family: str, kind: type[peft.PeftConfig], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    theirs(family, kind(task_type=KINDS[tiny.task(family)], **options), tmp_path / "theirs")
    with pytest.raises(UsageError, match=message) as refusal:
        interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert refusal.value.cause and refusal.value.remedy
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning"])
def test_a_decoder_that_classifies(name: str, tmp_path: Path) -> None:
    """Its head is not in the checkpoint; PEFT gets it, and its labels, with the adapter."""
    labels = ["no", "yes", "maybe"]
    source = backbone.resolve(str(tiny.folder("gpt2")))

    def adapted(seed: int) -> tuple[backbone.Backbone, base.Method]:
        made = backbone.load(source, task="classification", at="fp32", labels=labels, seed=seed)
        method = tiny.method(name)
        base.complete(method, made)
        made.model.eval()
        return made, method

    batch = tiny.batch("classification", lengths=(9, 9))
    made, method = adapted(seed=0)
    randomised(made.model, seed=7)
    card = adapter.card(
        method, model=source.name, task="classification", precision="fp32", labels=tuple(labels), seed=0
    )
    adapter.save(tmp_path / "ours", made.model, card)
    expected = sample_logits(made.model, [batch])
    notes = interop.convert(tmp_path / "ours", tmp_path / "theirs")
    assert ("do not pad there" in "".join(notes)) == (name == "prompt_tuning")
    model = as_its_readme_says(tmp_path / "theirs")
    assert relative_difference(expected, sample_logits(model.eval(), [batch])) < 1e-5
    assert model.get_base_model().config.id2label == dict(enumerate(labels))
    interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert adapter.read_card(tmp_path / "back").labels == tuple(labels)
    again, _ = adapted(seed=1)
    adapter.load(tmp_path / "back", again.model)
    assert relative_difference(expected, sample_logits(again.model, [batch])) < 1e-5


def as_its_readme_says(folder: Path) -> Any:
    """What the program in README.md loads."""
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert program is not None
    made: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(program[1], made)
    return made["model"]


def test_labels_are_those_of_the_backbone_where_peft_kept_none(tmp_path: Path) -> None:
    saved("bert", "ia3", {}, tmp_path / "ours")
    interop.convert(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "theirs" / adapter.CARD).unlink()
    interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert adapter.read_card(tmp_path / "back").labels == tuple(plain("bert").config.id2label.values())


def test_an_adapter_of_a_packed_backbone(tmp_path: Path) -> None:
    """Names and shapes are those of any; what the backbone was packed to is in the card and the README."""
    saved("llama", "lora", {"rank": 3}, tmp_path / "ours", at="nf4")
    interop.convert(tmp_path / "ours", tmp_path / "theirs")
    model = peft.PeftModel.from_pretrained(plain("llama"), tmp_path / "theirs").eval()
    assert relative_difference(logits(model, "llama"), loaded("llama", tmp_path / "ours")) < 1e-5
    assert 'bnb_4bit_quant_type="nf4"' in (tmp_path / "theirs" / "README.md").read_text()
    interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert adapter.read_card(tmp_path / "back").precision == "nf4"


def test_a_prompt_that_came_from_elsewhere_is_a_prompt(tmp_path: Path) -> None:
    expected = saved("llama", "spot", {}, tmp_path / "ours")
    interop.convert(tmp_path / "ours", tmp_path / "theirs")
    model = peft.PeftModel.from_pretrained(plain("llama"), tmp_path / "theirs").eval()
    assert relative_difference(expected, logits(model, "llama")) < 1e-5


def test_sizes_are_split_alike() -> None:
    assert all(split(size) == factorization(size) for size in range(1, 2000))


def test_layers_left_alone_are_said(tmp_path: Path) -> None:
    theirs("llama", peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), tmp_path / "theirs")
    notes = interop.convert(tmp_path / "theirs", tmp_path / "back")
    assert notes == (
        "It leaves layers alone that lora changes here, such as model.layers.0.self_attn.q_proj.delta: "
        "there the change is nothing.",
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter in either format."""
    folder = tmp_path_factory.mktemp("stored")
    saved("llama", "lora", {"rank": 2}, folder / "ours")
    interop.convert(folder / "ours", folder / "theirs")
    return folder


def test_another_backbone_is_refused(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "theirs", tmp_path / "theirs")
    for family, message in (("gpt2", "changes model.layers.0"), ("bert", "not trained for causal-lm")):
        with pytest.raises(EdgePeftError, match=message):
            interop.convert(folder, tmp_path / "back", str(tiny.folder(family)))
    wide = tiny.model("llama", intermediate_size=80)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(EdgePeftError, match=r"does not belong to this model(.|\n)*of another shape"):
        interop.convert(folder, tmp_path / "back", str(tmp_path / "wide"))
    ours = shutil.copytree(stored / "ours", tmp_path / "ours")
    card = json.loads((ours / adapter.CARD).read_text())
    (ours / adapter.CARD).write_text(json.dumps({**card, "model": str(tmp_path / "wide")}))
    with pytest.raises(EdgePeftError, match=r"does not belong to this model(.|\n)*of another shape"):
        interop.convert(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


DAMAGES: list[tuple[str, str | None, str]] = [
    (WEIGHTS, None, "is missing or damaged"),
    (WEIGHTS, "half", "is missing or damaged"),
    (CONFIG, "{", "is missing or damaged"),
    (CONFIG, "[]", "names no peft_type"),
    (CONFIG, '{"peft_type": "LORA", "task_type": "CAUSAL_LM"}', "names no backbone"),
    (CONFIG, '{"peft_type": "LORA", "task_type": "QUESTION_ANS", "base_model_name_or_path": "x"}', "for QUESTION_ANS"),
    (CONFIG, '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "MODEL"}', "'lora_alpha'"),
    (CONFIG, '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/gone"}', "no model '/gone'"),
]


@pytest.mark.parametrize(("file", "content", "message"), DAMAGES)
def test_damaged_files_are_refused(file: str, content: str | None, message: str, stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "theirs", tmp_path / "theirs")
    if content is None:
        (folder / file).rename(folder / "adapter_model.bin.part")
    elif content == "half":
        (folder / file).write_bytes((folder / file).read_bytes()[:500])
    else:
        (folder / file).write_text(content.replace("MODEL", str(tiny.folder("llama"))))
    with pytest.raises(EdgePeftError) as refusal:
        interop.convert(folder, tmp_path / "back")
    assert message in str(refusal.value)
    assert not (tmp_path / "back").exists()


def test_a_pickle_is_not_opened(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "theirs", tmp_path / "theirs")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(EdgePeftError, match="a pickle"):
        interop.convert(folder, tmp_path / "back")


def test_an_adapter_of_peft_s_own_layers_needs_no_translation(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "ours", tmp_path / "run" / "adapter")
    card = json.loads((folder / adapter.CARD).read_text())
    (folder / adapter.CARD).write_text(json.dumps({**card, "method": "peft:loha.json", "options": {}}))
    for source in (folder, tmp_path / "run"):
        with pytest.raises(UsageError, match="is one of PEFT's as it is"):
            interop.convert(source, tmp_path / "new")


def test_the_command(stored: Path, tmp_path: Path) -> None:
    def edgepeft(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, ["adapter", *map(str, arguments)], catch_exceptions=True)

    assert edgepeft(stored / "ours", tmp_path / "theirs").exit_code == 0
    shutil.copytree(stored / "ours", tmp_path / "run" / "adapter")
    assert edgepeft(tmp_path / "run", tmp_path / "of-a-run").exit_code == 0
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "of-a-run" / file).read_bytes()
    assert edgepeft(tmp_path / "theirs", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / adapter.TENSORS).exists()
    for arguments, message in (
        ((stored / "ours", tmp_path / "theirs"), "is already there"),
        ((tmp_path, tmp_path / "new"), "There is no adapter in"),
        ((tmp_path / "gone", tmp_path / "new"), "There is no adapter in"),
        ((stored / "ours", tmp_path / "new", "--model", "gpt2"), "--model goes with an adapter of PEFT's"),
    ):
        refused = edgepeft(*arguments).exception
        assert isinstance(refused, UsageError) and message in str(refused)
    assert not (tmp_path / "new").exists()
