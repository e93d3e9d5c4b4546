"""What placements promise to any method: a delta adds and folds exactly, a selection trains what it names."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import precision
from edgepeft.placements import delta, selection


class Dense(delta.Additive):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.randn(linear.out_features, linear.in_features))

    def change(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense.to(x.dtype))

    def weight(self) -> Tensor:
        return self.dense.detach()


@pytest.mark.parametrize("bias", [True, False])
def test_a_delta_adds_and_folds(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2))
    linear: nn.Linear = model[0]  # type: ignore[assignment]
    weight = linear.weight.detach().clone()
    heard: list[int] = []
    linear.register_forward_hook(lambda *_: heard.append(1))
    change = Dense(linear)
    delta.attach(linear, change)
    x = torch.randn(3, 6)
    expected = F.linear(x, weight + change.weight(), linear.bias)
    torch.testing.assert_close(linear(x), expected)
    before = model(x)
    delta.fold(model)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(linear.weight, weight + change.weight())
    assert not list(linear.children()) and len(linear._forward_hooks) == 1, "other hooks stay"
    assert len(heard) == 3


def test_a_copy_has_a_delta_of_its_own() -> None:
    linear = nn.Linear(6, 4)
    delta.attach(linear, Dense(linear))
    twin = copy.deepcopy(linear)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), linear(x))
    with torch.no_grad():
        twin.delta.dense.zero_()  # type: ignore[union-attr, operator]
    assert not torch.equal(twin(x), linear(x))


def test_packed_layers_must_be_unpacked_before_folding() -> None:
    """The weights of a packed layer cannot be written: its delta stays, and works on."""
    model = nn.Sequential(precision.pack(nn.Linear(64, 64).to(torch.bfloat16), "nf4"))
    delta.attach(model[0], Dense(nn.Linear(64, 64)))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    before = model(x)
    delta.fold(model)
    assert torch.equal(model(x), before)


def test_several_deltas_on_one_layer_add_up() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    linear: nn.Linear = model[0]  # type: ignore[assignment]
    one, two = Dense(linear), Dense(linear)
    expected = linear.weight.detach() + one.weight() + two.weight()
    for change in (one, two):
        delta.attach(linear, change)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), F.linear(x, expected, linear.bias))
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters()} == {"0", "0.delta", "0.delta1"}
    delta.fold(model)
    torch.testing.assert_close(linear.weight, expected)
    assert not list(linear.children()) and not linear._forward_hooks and not linear._forward_pre_hooks


@pytest.mark.parametrize("at", ["bf16", "int8", "nf4"])
def test_where_half_precision_is_multiplied_in_fp32_the_sum_is_rounded_once(at: str) -> None:
    """A change far below the last bit of the output still reaches every output that it tips over."""
    plain = nn.Linear(64, 64).to(torch.bfloat16)
    stored = precision.BF16Linear(plain.weight, plain.bias) if at == "bf16" else precision.pack(plain, at)
    change = Dense(plain)
    change.dense.data.mul_(1e-3)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    with precision.emulating(bf16=False):
        before = stored(x)
        exact = F.linear(x.float(), stored.dequantize(torch.float32), plain.bias.float())
        exact += x.float() @ change.dense.t()
        delta.attach(stored, change)
        change.change = lambda x: x.float() @ change.dense.t()  # type: ignore[method-assign]
        assert torch.equal(stored(x), exact.to(torch.bfloat16))
        assert not torch.equal(stored(x), before + (x.float() @ change.dense.t()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_selection_trains_what_it_names(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype).requires_grad_(False)
    tiny.randomise(model)
    x = torch.randn(2, 4, dtype=dtype)
    before = model(x)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    selection.train(model, ["1.weight", "0.bias"])
    assert torch.equal(model(x), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {selection.canonical(name) for name in trained} == {"1.weight", "0.bias"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trained.values())
    selection.fold(model)
    state = dict(model.named_parameters())
    assert list(sorted(state)) == sorted(values)
    assert torch.equal(state["1.weight"], values["1.weight"].float())


def test_a_selection_of_both_parameters_of_a_layer() -> None:
    model = nn.LayerNorm(4).to(torch.bfloat16).requires_grad_(False)
    selection.train(model, ["weight", "bias"])
    assert sum(p.requires_grad for p in model.parameters()) == 2
    assert copy.deepcopy(model)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16
    selection.fold(model)
    assert type(model) is nn.LayerNorm
