"""What the methods that select whole parameters train, where it acts, and what they refuse."""

from __future__ import annotations

from typing import Any

import conformance
import pytest
import tiny
import torch
from torch import nn
from transformers import OlmoConfig

from edgepeft import adapter, anatomy, backbone, precision
from edgepeft.errors import UsageError
from edgepeft.merge import to_full_precision
from edgepeft.methods import base
from edgepeft.placements import delta, selection


def trained(family: str, name: str, **options: Any) -> set[str]:
    made, _ = tiny.adapted(family, name, **options)
    return set(adapter.trained(made.model)) - made.fresh


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "qwen2"])
@pytest.mark.parametrize("at", ["fp32", "bf16", "nf4"])
def test_bitfit_trains_every_bias_below_the_head(family: str, at: str) -> None:
    made, _ = tiny.adapted(family, "bitfit", at)
    plain = tiny.load(family)
    below = {
        n for n, _ in plain.model.named_parameters() if any(n.startswith(f"{b.path}.") for b in plain.anatomy.blocks)
    }
    below |= {f"{norm}.bias" for norm in plain.anatomy.norms if hasattr(plain.model.get_submodule(norm), "bias")}
    assert set(adapter.trained(made.model)) - made.fresh == {n for n in below if n.endswith(".bias")}


@pytest.mark.parametrize("family", ["llama", "t5", "t5-gated", "gemma2"])
def test_bitfit_says_what_to_do_without_biases(family: str) -> None:
    with pytest.raises(UsageError, match="finds no biases") as caught:
        tiny.adapted(family, "bitfit")
    assert "ln_tuning" in caught.value.remedy


@pytest.mark.parametrize(("name", "said"), [("ln_tuning", "finds nothing to train"), ("bitfit", "finds no biases")])
def test_a_model_whose_norms_have_no_weights_is_told_what_else_there_is(name: str, said: str) -> None:
    """OLMo's LayerNorms only normalise, and its linear layers have no biases."""
    config = OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    made = backbone.skeleton(config, task="causal-lm", at="fp32")
    with pytest.raises(UsageError, match=said) as caught:
        base.apply(base.create(name), made)
    assert "--method ia3" in caught.value.remedy


@pytest.mark.parametrize("at", ["int8", "nf4"])
def test_a_packed_layers_bias_gets_the_gradient_of_a_plain_one(at: str) -> None:

    torch.manual_seed(0)
    plain = nn.Linear(64, 16, dtype=torch.bfloat16)
    packed = precision.pack(plain, at)
    assert packed.bias is not None
    packed.bias.requires_grad_(True)
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    g = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    packed(x).backward(g)
    assert packed.bias.grad is not None
    torch.testing.assert_close(packed.bias.grad.float(), g.float().sum((0, 1)), rtol=0.02, atol=0.02)


def test_an_unpacked_layer_has_the_trained_bias_in_full_precision() -> None:
    made, method = tiny.adapted("bert", "bitfit", "nf4")
    conformance.randomised(made.model)
    masters = {n: p.detach().clone() for n, p in adapter.trained(made.model).items()}

    to_full_precision(made.model)
    method.merge(made.model)
    assert all(torch.equal(made.model.get_parameter(name), master) for name, master in masters.items())


def test_cross_attention_is_trained_and_nothing_else() -> None:
    names = trained("t5", "cross_attention")
    assert names == {f"decoder.block.{i}.layer.1.EncDecAttention.{p}.weight" for i in (0, 1) for p in "qkvo"}
    with pytest.raises(UsageError, match="no cross-attention"):
        tiny.adapted("llama", "cross_attention")


@pytest.mark.parametrize(("family", "prefix"), [("bert", "bert.encoder.layer.1."), ("t5", "decoder.block.1.")])
def test_top_layers_are_the_last_of_the_last_stack(family: str, prefix: str) -> None:
    plain = {n for n, _ in tiny.load(family).model.named_parameters()}
    assert trained(family, "top_layers", layers=1) == {n for n in plain if n.startswith(prefix)}


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UsageError, match="last stack has 2") as caught:
        tiny.adapted("bert", "top_layers", layers=3)
    assert "layers=1" in caught.value.remedy


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gemma2"])
def test_diff_fit_trains_biases_norms_embeddings_and_scales(family: str) -> None:
    made, _ = tiny.adapted(family, "diff_fit")
    scales = {n for n in adapter.trained(made.model) if n.endswith(".delta.scale")}
    sub_layers = {"bert": 4, "llama": 4, "t5": 10, "gemma2": 0}  # Gemma 2 has norms there
    assert len(scales) == sub_layers[family]
    plain = tiny.load(family)
    norms = {n for n, _ in plain.model.named_parameters() if n.rpartition(".")[0] in plain.anatomy.norms}
    looked_up = {
        n for n, _ in plain.model.named_parameters() if n.rpartition(".")[0] in anatomy.embeddings(plain.model)
    }
    biases = set(selection.biases(plain.model, plain.anatomy))
    assert set(adapter.trained(made.model)) - made.fresh == scales | norms | looked_up | biases


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_scale_scales_what_is_added_to_the_residual_stream(family: str) -> None:
    """Each sub-layer's output, of the same input, is that of the backbone times the factors."""
    made, _ = tiny.adapted(family, "diff_fit")
    plain = tiny.load(family)
    scales = {n: m for n, m in made.model.named_modules() if isinstance(m, delta.Delta)}
    for name, module in scales.items():
        factors = torch.rand(32) + 0.5
        module.get_parameter("scale").data.copy_(factors)
        linear = name.rpartition(".")[0]
        x = torch.randn(2, 3, plain.model.get_submodule(linear).in_features)
        expected = plain.model.get_submodule(linear)(x) * factors
        torch.testing.assert_close(made.model.get_submodule(linear)(x), expected)
    ends = {
        b.linears[r][0] for b in plain.anatomy.blocks for r in ("output", "cross_output", "ffn_out") if r in b.linears
    }
    assert {name.rpartition(".")[0] for name in scales} == ends


def test_a_scale_near_1_does_in_bf16_what_its_merge_does() -> None:
    made, _ = tiny.adapted("bert", "diff_fit", at="bf16")
    name, module = next((n, m) for n, m in made.model.named_modules() if isinstance(m, delta.Delta))
    linear = made.model.get_submodule(name.rpartition(".")[0])
    x = torch.randn(2, 300, linear.in_features).bfloat16()
    before = linear(x).double()
    module.get_parameter("scale").data.fill_(1.003)  # rounded to bf16 by itself, it is 1
    found = linear(x).double()
    torch.testing.assert_close(found, before * 1.003, rtol=2**-8, atol=0)
    assert (found.norm() / before.norm()).item() == pytest.approx(1.003, abs=3e-4)


@pytest.mark.parametrize("at", ["fp32", "bf16"])
def test_a_tied_parameter_has_one_master(at: str) -> None:
    made = tiny.load("t5", at)
    selection.train(made.model, ["shared.weight"])
    assert list(adapter.trained(made.model)) == ["shared.weight"]
    parameter = next(iter(adapter.trained(made.model).values()))
    assert parameter.dtype is torch.float32
    tiny.randomise(nn.ParameterList([parameter]), seed=5)
    model: Any = made.model
    for owner in ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        assert torch.equal(
            model.get_submodule(owner).weight.float(), parameter.to(precision.compute_dtype(at)).float()
        ), owner
    selection.fold(model)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("shared.weight")


@pytest.mark.parametrize("name", ["cross_attention", "top_layers", "lt_sft", "fish_mask", "far", "diff_pruning"])
@pytest.mark.parametrize("at", ["int8", "nf4"])
def test_packed_backbones_are_refused(name: str, at: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot train on {at} weights"):
        base.create(name).check(at)
