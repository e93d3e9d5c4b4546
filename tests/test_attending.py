"""Attention where PyTorch has no fused kernel: the same function, without the scores."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from edgepeft import precision, probe, traces
from edgepeft.attending import attend

WINDOW = torch.ones(6, 6).tril().triu(-2).bool().expand(2, 1, 6, 6)
MASKS = {"causal": None, "bool": WINDOW, "float": torch.zeros(2, 1, 6, 6).masked_fill(~WINDOW, -1e4)}


def states(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 2, 6, 8)
    return [each.to(dtype).requires_grad_() for each in (query, key, value)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_attention_in_fp32(dtype: torch.dtype, mask: str) -> None:
    """With keys that two heads share, a bias that is trained, and gradients of all."""
    module, given = SimpleNamespace(num_key_value_groups=2, is_causal=True), MASKS[mask]
    found: list[Tensor | None] = []
    expected: list[Tensor | None] = []
    for results in (found, expected):
        made = [*states(dtype), torch.linspace(-1, 1, 36).view(1, 1, 6, 6).to(dtype).requires_grad_()]
        if results is found:
            added = given.to(dtype) if given is not None and given.is_floating_point() else given
            query, key, value, bias = made
            with precision.emulating(cuda=True, bf16=False):
                output, _ = attend(module, query, key, value, added, position_bias=bias, scaling=0.3)
            assert output.dtype is dtype
        else:
            query, key, value, bias = (each.float() for each in made)
            output, _ = sdpa_attention_forward(module, query, key, value, given, position_bias=bias, scaling=0.3)
        output.float().square().sum().backward()
        results += [output, *(each.grad for each in made)]
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)


def test_dropout_is_the_same_in_backward() -> None:
    module, (query, key, value) = SimpleNamespace(is_causal=False), states(torch.bfloat16)
    with precision.emulating(cuda=True, bf16=False):
        output, _ = attend(module, query, key, value, None, dropout=0.5)
    output[0, :, 0].sum().backward()  # of one row of tokens, some of which dropout took away from some heads
    assert value.grad is not None
    seen = value.grad[0].abs().sum(-1) > 0
    assert seen.any() and value.grad[1].abs().sum() == 0
    torch.manual_seed(1)
    assert not torch.equal(output[0, :, 0], output[0, :, 1])


def test_a_gpu_without_bf16_keeps_no_scores() -> None:
    """A language model of 4096 tokens takes on a Turing about what it takes on an Ampere."""
    usual = replace(traces.usual("llama-3.2-1b", "lora", "nf4", checkpointing=True, cuda=True, bf16=True), tokens=4096)
    model = {**usual.model, "num_hidden_layers": 2}
    with_bf16, without = (
        probe.peaks(replace(usual, model=model, bf16=bf16))["forward+backward"] for bf16 in (True, False)
    )
    scores = 4 * usual.model["num_attention_heads"] * 4096 * 4096
    assert abs(sum(without.bytes.values()) - sum(with_bf16.bytes.values())) < scores / 4
