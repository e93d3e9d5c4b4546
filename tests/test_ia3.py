"""(IA)³ is HF PEFT's (IA)³; of a fused projection it leaves the queries alone."""

from __future__ import annotations

import peft_twin
import pytest
import tiny
import torch
from peft import IA3Config
from torch import nn

from edgepeft import adapter
from edgepeft.placements import scale


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "t5-gated", "distilbert", "qwen3"])
def test_logits_gradients_and_merged_weights_are_those_of_peft(family: str) -> None:
    made, method = tiny.adapted(family, "ia3")
    hidden = made.anatomy.linears(("ffn_out",))
    both = [*made.anatomy.linears(("key", "value", "cross_key", "cross_value")), *hidden]
    config = IA3Config(target_modules=both, feedforward_modules=hidden)

    def theirs_of(name: str) -> str:
        return f"{name.rpartition('.')[0].rpartition('.')[0]}.ia3_l.default"

    peft_twin.compare(family, made, method, config, theirs_of)


def test_queries_of_a_fused_projection_are_not_scaled() -> None:
    made, method = tiny.adapted("gpt2", "ia3")
    name = "transformer.h.0.attn.c_attn"
    linear = made.model.get_submodule(name)
    factors = adapter.trained(made.model)[f"{name}.output_scale.factors"]
    assert tuple(factors.shape) == (64,), "keys and values of width 32"
    tiny.randomise(nn.ParameterList([factors]))
    x = torch.randn(3, 32)
    plain = tiny.load("gpt2").model.get_submodule(name)(x)
    torch.testing.assert_close(linear(x)[:, :32], plain[:, :32])
    torch.testing.assert_close(linear(x)[:, 32:], plain[:, 32:] * factors)
    expected = linear(x)
    method.merge(made.model)
    torch.testing.assert_close(made.model.get_submodule(name)(x), expected)


@pytest.mark.parametrize("place", [scale.inputs, scale.outputs])
def test_a_factor_near_one_is_not_lost_in_bf16(place: object) -> None:
    """Rounded to bf16 itself, 1.003 would be 1.0."""
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    before = linear(x).detach().float()
    factors = scale.Scale(64, torch.device("cpu"))
    nn.init.constant_(factors.factors, 1.003)
    place(linear, factors)  # type: ignore[operator]
    ratio = (linear(x).float() * before).sum() / before.square().sum()
    assert abs(ratio - 1.003) < 1e-3
