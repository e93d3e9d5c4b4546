"""Bottleneck adapters against the layers of each family written out by hand, in float64."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import adapter, step
from edgepeft.errors import UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.merge import relative_difference
from edgepeft.methods import base
from edgepeft.methods.krona_res import Residual
from edgepeft.placements.bottleneck import Bottleneck

FAMILIES = ("bert", "distilbert", "llama", "gemma2", "gpt2", "t5", "t5-gated")
Part = Callable[[Tensor], Tensor]
# A family's layer, given its modules, its input, its other arguments, and what adapters do: to what attention and the
# feed-forward give (and the second of these reads), and to what leaves the layer, given the last norm if it ends it.
Told = tuple[Part, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]]


def _bert(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    output = layer.attention.output
    x = output.LayerNorm(attended(output.dense(layer.attention.self(x, **arguments)[0])) + x)
    fed = layer.output.dense(layer.intermediate(x))
    return leaving(feeding(fed, x) + x, layer.output.LayerNorm)


def _distilbert(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    x = layer.sa_layer_norm(attended(layer.attention(x, **arguments)[0]) + x)
    fed = layer.ffn.lin2(layer.ffn.activation(layer.ffn.lin1(x)))
    return leaving(feeding(fed, x) + x, layer.output_layer_norm)


def _llama(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    x = x + attended(layer.self_attn(hidden_states=layer.input_layernorm(x), **arguments)[0])
    read = layer.post_attention_layernorm(x)
    return leaving(x + feeding(layer.mlp(read), read), lambda y: y)


def _gemma2(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    read = layer.input_layernorm(x)
    x = x + attended(layer.post_attention_layernorm(layer.self_attn(hidden_states=read, **arguments)[0]))
    read = layer.pre_feedforward_layernorm(x)
    return leaving(x + feeding(layer.post_feedforward_layernorm(layer.mlp(read)), read), lambda y: y)


def _gpt2(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    x = x + attended(layer.attn(layer.ln_1(x), **arguments)[0])
    read = layer.ln_2(x)
    return leaving(x + feeding(layer.mlp(read), read), lambda y: y)


def _t5(layer: Any, x: Tensor, arguments: dict[str, Any], told: Told) -> Tensor:
    attended, feeding, leaving = told
    first, *others = layer.layer
    attention = first.SelfAttention(
        first.layer_norm(x), mask=arguments["attention_mask"], position_bias=arguments["position_bias"]
    )
    x = x + attended(attention[0])
    if len(others) == 2:
        cross = others[0].EncDecAttention(
            others[0].layer_norm(x),
            mask=arguments["encoder_attention_mask"],
            key_value_states=arguments["encoder_hidden_states"],
            position_bias=arguments["encoder_decoder_position_bias"],
        )
        x = x + cross[0]
    read = others[-1].layer_norm(x)
    return leaving(x + feeding(others[-1].DenseReluDense(read), read), lambda y: y)


LAYERS = {
    "bert": _bert,
    "distilbert": _distilbert,
    "llama": _llama,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "t5": _t5,
    "t5-gated": _t5,
}


# Where the papers put what they add: after both sub-layers, after the feed-forward, beside it, behind the sum after it.
AFTER_BOTH = ("houlsby", "sparse_adapter", "phm_adapter", "compacter")
AFTER_LAST = ("adamix", "compacter_pp")
BESIDE = ("parallel", "mam", "krona_res")
BEHIND = ("pfeiffer",)
RELU = ("parallel", "mam", "pfeiffer")  # all others: GELU
SCALED = ("parallel", "mam")  # by the 4 of He et al.


def written_out(each: Any, name: str) -> Part:
    """What a bottleneck computes, whose projections are looked at elsewhere, or KronA's product and residual."""
    if name == "krona_res":
        return lambda x: x @ torch.kron(each.product.a, each.product.b).T + each.residual * x
    activation = torch.relu if name in RELU else nn.functional.gelu
    return lambda x: (4.0 if name in SCALED else 1.0) * _projected(activation(_projected(x, each.down)), each.up)


def _projected(x: Tensor, part: nn.Module) -> Tensor:
    own = dict(part.named_parameters())
    plain = own.keys() == {"weight", "bias"} and own["weight"].dim() == 2 and not list(part.buffers())
    return x @ own["weight"].T + own["bias"] if plain else part(x)


def told(name: str, added: list[Any]) -> Told:
    """The method's paper in a line each."""
    first, last = written_out(added[0], name), written_out(added[-1], name)

    def same(h: Tensor) -> Tensor:
        return h

    if name in AFTER_BOTH:
        return lambda h: h + first(h), lambda h, x: h + last(h), lambda s, norm: norm(s)
    if name in AFTER_LAST:
        return same, lambda h, x: h + last(h), lambda s, norm: norm(s)
    if name in BEHIND:
        return same, lambda h, x: h, lambda s, norm: norm(s + last(norm(s)))
    return same, lambda h, x: h + last(x), lambda s, norm: norm(s)


@pytest.mark.parametrize("name", [*AFTER_BOTH, *AFTER_LAST, *BESIDE, *BEHIND])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_computes_what_the_paper_says(family: str, name: str) -> None:
    made, _ = tiny.adapted(family, name)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    other = tiny.adapted(family, "prefix_tuning")[0] if name == "mam" else tiny.load(family)  # what MAM has too
    trained = adapter.trained(made.model)
    for key, parameter in adapter.trained(other.model).items():
        parameter.data.copy_(trained[key].data)
    plain, model = other.model.eval().double(), made.model.eval().double()
    seen: dict[str, tuple[Tensor, dict[str, Any], Tensor]] = {}

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = model.get_submodule(path)
        given = dict(zip(inspect.signature(type(layer).forward).parameters, (layer, *args), strict=False)) | kwargs
        given = {key: value for key, value in given.items() if key not in ("self", "use_cache", "past_key_values")}
        if not isinstance(output, Tensor):
            given["position_bias"], given["encoder_decoder_position_bias"] = output[1], output[2]
        seen[path] = given.pop("hidden_states"), given, output if isinstance(output, Tensor) else output[0]

    for block in made.anatomy.blocks:
        model.get_submodule(block.path).register_forward_hook(
            lambda m, args, kwargs, output, path=block.path: see(path, args, kwargs, output), with_kwargs=True
        )
    lengths = (9, 9) if family == "gemma2" else (5, 12)  # its masks overflow the fp32 softmax in fp64
    model(**step.inputs(tiny.batch(family, lengths=lengths)))
    for block in made.anatomy.blocks:
        layer = model.get_submodule(block.path)
        added = [module for module in layer.modules() if isinstance(module, (Bottleneck, Residual))]
        assert len(added) == (2 if name in AFTER_BOTH else 1)
        x, arguments, found = seen[block.path]
        expected = LAYERS[family](plain.get_submodule(block.path), x, arguments, told(name, added))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        without = LAYERS[family](
            plain.get_submodule(block.path), x, arguments, (lambda h: h, lambda h, x: h, lambda s, norm: norm(s))
        )
        assert (found - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
def test_projections_start_near_zero_and_the_model_near_its_backbone(name: str) -> None:
    made, _ = tiny.adapted("llama", name)
    for trained, parameter in adapter.trained(made.model).items():
        if trained.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.abs().max() <= 0.02 and parameter.detach().std() == pytest.approx(0.01, rel=0.3)
    batch = tiny.batch("llama")
    moved = relative_difference(sample_logits(tiny.load("llama").model, [batch]), sample_logits(made.model, [batch]))
    assert 0 < moved < 5e-3


def test_a_parallel_adapter_starts_at_zero_and_is_scaled() -> None:
    made, _ = tiny.adapted("bert", "parallel", scale=3.0)
    bottlenecks = [module for module in made.model.modules() if isinstance(module, Bottleneck)]
    assert {each.scale for each in bottlenecks} == {3.0}
    for each in bottlenecks:
        assert not each.up.get_parameter("weight").any()
        assert each.down.get_parameter("weight").abs().max() <= 1 / math.sqrt(32)


@pytest.mark.parametrize(("name", "count"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_parameters_of_a_layer(name: str, count: int) -> None:
    made, _ = tiny.adapted("t5", name, reduction=4)
    trained = sum(parameter.numel() for parameter in adapter.trained(made.model).values())
    assert trained == count * 4 * (2 * 32 * 8 + 8 + 32)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel"])
def test_bf16_keeps_fp32_parameters(name: str) -> None:
    made, _ = tiny.adapted("llama", name, "bf16")
    assert {parameter.dtype for parameter in adapter.trained(made.model).values()} == {torch.float32}
    assert made.model(**step.inputs(tiny.batch("llama"))).logits.dtype == torch.bfloat16


def test_a_copy_of_a_parallel_adapter_taps_its_own_layers() -> None:
    made, _ = tiny.adapted("t5", "parallel")
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    batch = step.inputs(tiny.batch("t5"))
    expected = made.model(**batch).logits
    twin = copy.deepcopy(made.model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin(**batch)
    assert torch.equal(made.model(**batch).logits, expected)


METHODS = ("houlsby", "pfeiffer", "parallel", "adamix", "sparse_adapter", "phm_adapter", "compacter", "compacter_pp")


@pytest.mark.parametrize("name", METHODS)
def test_a_reduction_that_does_not_divide_the_width_is_refused(name: str) -> None:
    made = tiny.load("bert")
    before = {n: type(module) for n, module in made.model.named_modules()}
    with pytest.raises(UsageError, match=f"{name} cannot work with reduction = 5 on this model") as caught:
        base.apply(tiny.method(name, reduction=5), made)
    assert "hidden size, 32: be one of 1, 2, 4, 8, 16, 32." in caught.value.cause
    assert caught.value.remedy == "Use --set options.reduction=4."
    assert {n: type(module) for n, module in made.model.named_modules()} == before


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        *((name, {"reduction": 0}, "with reduction = 0.\nIt must be at least 1") for name in METHODS),
        ("parallel", {"scale": 0.0}, "with scale = 0.0.\nIt must be above 0"),
        ("adamix", {"experts": 1}, "with experts = 1.\nIt must be at least 2"),
        ("adamix", {"consistency": -1.0}, "with consistency = -1.0.\nIt must be at least 0"),
        ("sparse_adapter", {"sparsity": 1.0}, "with sparsity = 1.0.\nIt must be a share below 1"),
        ("sparse_adapter", {"score": "snap"}, "there is no score 'snap'"),
        ("phm_adapter", {"n": 0}, "with n = 0.\nIt must be at least 1"),
        ("compacter", {"rank": 0}, "with rank = 0.\nIt must be at least 1"),
        ("compacter_pp", {"rank": 0}, "with rank = 0.\nIt must be at least 1"),
        ("lets", {"kept": 0.0}, "with kept = 0.0.\nIt must be a share above 0"),
        ("lets", {"early": 1.0}, "with early = 1.0.\nIt must be a share between 0 and 1"),
        ("attention_fusion", {"last": 1.0}, "with last = 1.0.\nIt must be a share between 0 and 1"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        base.create(name, options)
    assert part in str(caught.value)
