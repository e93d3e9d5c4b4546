"""DoRA is HF PEFT's DoRA; its norm is that of the dense weight and a constant in backward."""

from __future__ import annotations

import peft_twin
import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn

from edgepeft import precision
from edgepeft.anatomy import ROLES
from edgepeft.methods.dora import Decomposed
from edgepeft.methods.lora import LowRank
from edgepeft.placements import delta
from edgepeft.trace import Tracker

NAMES = {
    "low.a": "lora_A.default.weight",
    "low.b": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_logits_gradients_and_merged_weights_are_those_of_peft(family: str) -> None:
    made, method = tiny.adapted(family, "dora", rank=3, alpha=5.0)
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=made.anatomy.linears(ROLES))

    def theirs_of(name: str) -> str:
        path, _, leaf = name.partition(".delta.")
        return f"{path}.{NAMES[leaf]}"

    peft_twin.compare(family, made, method, config, theirs_of)


@pytest.mark.parametrize("at", ["fp32", "bf16", "int8", "nf4"])
def test_the_norm_is_that_of_the_dense_weight(at: str) -> None:
    plain = nn.Linear(64, 48, dtype=torch.float32 if at == "fp32" else torch.bfloat16)
    linear: nn.Module = precision.pack(plain, at) if precision.is_packed(at) else plain
    low = LowRank(plain, rank=4, scale=2.0, dropout=0.0)
    change = Decomposed(linear, low)
    weight = precision.weight_of(linear).detach().double()
    torch.testing.assert_close(change.magnitude.detach().double(), weight.norm(dim=1), rtol=1e-5, atol=0)
    tiny.randomise(low)
    dense = (weight + 2 * low.b.double() @ low.a.double()).norm(dim=1)
    torch.testing.assert_close(
        change.norm(linear).double(), dense, rtol=1e-5 if weight.dtype is torch.float32 else 3e-3, atol=1e-4
    )


def test_a_model_with_its_norms_detached_has_these_gradients() -> None:
    """Section 4.3 of the paper, written out densely in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 6, dtype=torch.float64)
    low = LowRank(linear, rank=2, scale=1.5, dropout=0.0)
    change = Decomposed(linear, low).double()
    tiny.randomise(change)
    x = torch.randn(5, 10, dtype=torch.float64)
    a, b, m = (t.detach().clone().requires_grad_() for t in (low.a, low.b, change.magnitude))
    direction = linear.weight.detach() + 1.5 * b @ a
    expected = x @ (m[:, None] / direction.norm(dim=1).detach()[:, None] * direction).t() + linear.bias
    delta.attach(linear, change)
    torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)
    expected.square().sum().backward()
    linear(x).square().sum().backward()
    for ours, theirs in ((low.a, a), (low.b, b), (change.magnitude, m)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_an_output_without_weights_is_trained_and_folded_without_nan() -> None:
    """A row of zeros, as pruning leaves it, has no direction: it is let through as it is until it has one."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 6)
    linear.weight.data[2] = 0
    x, change = torch.randn(5, 10), Decomposed(linear, LowRank(linear, rank=2, scale=1.5, dropout=0.0))
    plain = linear(x)
    delta.attach(linear, change)
    assert torch.equal(linear(x), plain)
    linear(x).square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in change.parameters())
    tiny.randomise(change)
    change.low.b.data[3] = 0  # one row of V that is W's, and one that is zero
    change.low.b.data[2] = 0
    expected = linear(x)
    delta.fold(linear)
    assert expected.isfinite().all()
    torch.testing.assert_close(linear(x), expected)


def test_no_dense_weight_is_kept_for_backward() -> None:
    linear = precision.pack(nn.Linear(512, 512, bias=False).bfloat16(), "nf4")
    delta.attach(linear, Decomposed(linear, LowRank(linear, 4, 1.0, 0.0)))
    x = torch.randn(2, 512, dtype=torch.bfloat16, requires_grad=True)
    tracker = Tracker(cuda=False)
    tracker.label([*linear.parameters(), *linear.buffers()], "weights")
    with tracker.phase("forward"):
        kept = linear(x)
        held = sum(tracker._bytes[uid] for uid in tracker._uid_of.values() if tracker._kind.get(uid) != "weights")
    assert kept.requires_grad and held < 64 * 512 * 4, "a dense weight takes 512 rows"
