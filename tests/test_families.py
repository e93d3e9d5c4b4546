"""Methods in models that are of a known build by the names of their parts, and differ in what their code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokenizers
import torch
import transformers
from conformance import gradients, randomised, train
from torch import Tensor, nn

from edgepeft import adapter, backbone, step
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.placements.late import Late

LABELS = [f"label-{number}" for number in range(tiny.LABELS)]
ENCODER = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
DECODER = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}
_SIZES: dict[str, dict[str, Any]] = {
    "Gte": ENCODER,
    "NomicBert": ENCODER,
    "ConvBert": ENCODER | {"embedding_size": 32},
    "RoFormer": ENCODER | {"embedding_size": 32},
    "Doge": DECODER,
    "Olmo": DECODER,
    "StableLm": DECODER,
    "GPTBigCode": {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}
    | {"n_positions": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
}


def load(family: str, task: str, folder: Path) -> Backbone:
    """A tiny model of a family that ``tiny`` has not, without dropout, from its file."""
    config = getattr(transformers, f"{family}Config")(**_SIZES[family], num_labels=tiny.LABELS)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    kind = "SequenceClassification" if task == "classification" else "CausalLM"
    model = getattr(transformers, f"{family}For{kind}")(config)
    tiny.randomise(model)
    model.save_pretrained(folder)
    labels = LABELS if task == "classification" else None
    return backbone.load(backbone.resolve(str(folder)), task=task, at="fp32", labels=labels)


@pytest.mark.parametrize("family", ["Gte", "NomicBert"])
@pytest.mark.parametrize("name", ["lets", "attention_fusion"])
def test_what_a_pooler_reads_is_what_was_changed_at_the_end(family: str, name: str, tmp_path: Path) -> None:
    made = load(family, "classification", tmp_path)
    base.apply(tiny.method(name), made)
    found = gradients(made.model, tiny.batch("classification"))
    assert all(found[each].any() for each, p in made.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["Gte", "NomicBert"])
def test_a_pooler_reads_the_first_token_behind_the_prompt(family: str, tmp_path: Path) -> None:
    made = load(family, "classification", tmp_path)
    base.apply(tiny.method("prompt_tuning"), made)
    read: list[Tensor] = []
    last: Any = made.model.get_submodule(made.anatomy.blocks[-1].linears["ffn_out"][0])
    last.register_forward_hook(lambda module, inputs, out: read.append(out))
    pooled: list[Tensor] = []
    made.model.base_model.pooler.register_forward_hook(lambda module, inputs, out: pooled.append(inputs[0]))
    batch = tiny.batch("classification")
    step.outputs(made.model, batch)
    assert pooled[0].shape[1] == batch["input_ids"].shape[1] == read[0].shape[1] - 5


def test_what_is_added_at_the_end_goes_before_a_norm_without_weights(tmp_path: Path) -> None:
    made = load("Olmo", "causal-lm", tmp_path)
    base.apply(tiny.method("lets"), made)
    randomised(made.model)
    ends: list[Tensor] = []
    normed: list[Tensor] = []
    (late,) = [module for module in made.model.modules() if isinstance(module, Late)]
    late.register_forward_hook(lambda module, inputs, out: ends.append(out))
    norm: nn.Module = made.model.get_submodule("model.norm")
    norm.register_forward_hook(lambda module, inputs, out: normed.append(inputs[0]))
    step.outputs(made.model, tiny.batch("causal-lm"))
    torch.testing.assert_close(normed[0], ends[0], rtol=0, atol=0)


def test_weights_that_are_views_of_a_fused_one_are_trained_inside_backward(tmp_path: Path) -> None:
    made = load("Gte", "classification", tmp_path)
    gate = made.model.get_parameter("gte.layers.0.mlp.gate_proj.weight")
    up = made.model.get_parameter("gte.layers.0.mlp.up_proj.weight")
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr(), "as transformers loads them"
    method = tiny.method("galore")
    base.apply(method, made)
    before = gate.detach().clone(), up.detach().clone()
    train(made.model, method, method.stages()[0], tiny.batch("classification"), 2)
    assert not torch.equal(gate, before[0]) and not torch.equal(up, before[1])


@pytest.mark.parametrize("family", ["Gte", "NomicBert"])
def test_a_saved_model_has_every_parameter_under_its_own_name(family: str, tmp_path: Path) -> None:
    """transformers writes the names, and the fused layers, of these families' first files if it is let."""
    made = load(family, "classification", tmp_path / "model")
    backbone.save(made.model, tmp_path / "saved", tiny_tokenizers.word_piece())
    read = list(backbone.saved(tmp_path / "saved", made.model))
    assert len(read) == len(list(made.model.parameters())) and all(torch.equal(own, other) for own, other in read)
    again = backbone.load(backbone.resolve(str(tmp_path / "saved")), task="classification", at="fp32", labels=LABELS)
    batch = tiny.batch("classification")
    torch.testing.assert_close(step.outputs(again.model, batch), step.outputs(made.model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "unipelt"])
def test_attention_that_is_given_its_mask_by_name(name: str, tmp_path: Path) -> None:
    """A row answers the same alone and padded, and all that is trained has a gradient."""
    made = load("Doge", "causal-lm", tmp_path)
    method = tiny.method(name)
    base.apply(method, made)
    batch = tiny.batch("causal-lm")
    train(made.model, method, method.stages()[0], batch, 1)
    length = int(batch["attention_mask"][-1].sum())
    with torch.no_grad():
        together = made.model(**step.inputs(batch)).logits[-1, :length]
        alone = made.model(input_ids=batch["input_ids"][-1:, :length]).logits[0]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    found = gradients(made.model, batch)
    assert all(each in found for each, p in made.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["ConvBert", "RoFormer"])
def test_attention_that_does_its_own_arithmetic_takes_a_prompt_and_no_prefix(family: str, tmp_path: Path) -> None:
    made = load(family, "classification", tmp_path)
    with pytest.raises(UsageError, match=f"keys and values of {family}SelfAttention"):
        base.apply(tiny.method("prefix_tuning"), made)
    made = load(family, "classification", tmp_path)
    base.apply(tiny.method("prompt_tuning"), made)
    found = gradients(made.model, tiny.batch("classification"))
    assert all(found[each].any() for each in adapter.trained(made.model) if each not in made.fresh)


def test_a_layer_that_hands_nothing_on_takes_no_prompt(tmp_path: Path) -> None:
    made = load("StableLm", "causal-lm", tmp_path)
    base.apply(tiny.method("prompt_tuning"), made)
    with pytest.raises(UsageError, match="do not reach StableLmAttention"):
        step.outputs(made.model, tiny.batch("causal-lm"))


def test_a_side_network_has_its_place_in_a_cache_of_another_name(tmp_path: Path) -> None:
    made = load("GPTBigCode", "causal-lm", tmp_path)
    base.apply(tiny.method("lst"), made)
    randomised(made.model)
    ids = tiny.batch("causal-lm", rows=1, lengths=(6, 6))["input_ids"]
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model: Any = made.model
    cached = model.generate(ids, use_cache=True, **asked)
    torch.testing.assert_close(cached, model.generate(ids, use_cache=False, **asked), rtol=0, atol=0)
