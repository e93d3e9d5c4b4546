"""Hybrids are the sum of their parts: with a part silenced, what is left is another method, or the backbone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from conformance import randomised
from torch import nn

from edgepeft import adapter, backbone
from edgepeft.backbone import Backbone
from edgepeft.evaluate import sample_logits
from edgepeft.methods import base, s4, unipelt
from edgepeft.placements.gate import Gate

FAMILIES = ("llama", "bert", "t5")
CLOSED, OPEN = -1e3, 1e3  # what a gate's sigmoid takes for 0 and for 1


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return adapter.trained(model)


def logits(model: nn.Module, family: str) -> torch.Tensor:
    return sample_logits(model.eval(), [tiny.batch(family)])[0]


def set_gates(model: nn.Module, bias: float) -> None:
    for module in model.modules():
        if isinstance(module, Gate):
            module.weight.data.zero_()
            module.bias.data.fill_(bias)


def randomised_twin(family: str, name: str, **options: Any) -> Any:
    made, _ = tiny.adapted(family, name, **options)
    randomised(made.model)
    return made.model


@pytest.mark.parametrize("family", FAMILIES)
def test_mam_is_a_prefix_and_a_parallel_adapter(family: str) -> None:
    mam = randomised_twin(family, "mam")
    prefix = tiny.adapted(family, "prefix_tuning")[0].model
    parts = [name for name in trained(mam) if ".bottleneck." not in name]
    assert parts == list(trained(prefix))
    for name in parts:
        trained(prefix)[name].data.copy_(trained(mam)[name].data)
    parallel, _ = tiny.adapted(family, "parallel")
    assert {name for name in trained(mam) if ".bottleneck." in name} == {
        name for name in trained(parallel.model) if ".bottleneck." in name
    }
    assert not torch.allclose(logits(mam, family), logits(prefix, family), atol=1e-3)
    for name, parameter in trained(mam).items():
        if ".bottleneck." in name and ".up." in name:
            parameter.data.zero_()
    assert torch.equal(logits(mam, family), logits(prefix, family))


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_unipelt_with_closed_gates_is_the_backbone(family: str) -> None:
    """Of a decoder too, but for its positions, which begin behind the prefix."""
    model = randomised_twin(family, "unipelt")
    plain = tiny.load(family).model
    plain.load_state_dict(
        {**plain.state_dict(), **{n: p for n, p in trained(model).items() if n in plain.state_dict()}}
    )
    assert not torch.allclose(logits(model, family), logits(plain, family), atol=1e-3)
    set_gates(model, CLOSED)
    torch.testing.assert_close(logits(model, family), logits(plain, family), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["unipelt", "adaptive_prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_behind_open_gates_is_a_plain_one(family: str, name: str) -> None:
    """Once the rest is silent: UniPELT's low-rank changes and adapters, the scales of adaptive prefixes."""
    model = randomised_twin(family, name)
    set_gates(model, OPEN)
    prefix = tiny.adapted(family, "prefix_tuning")[0].model
    for key, parameter in trained(model).items():
        if ".delta." in key or ".bottleneck." in key:
            parameter.data.zero_()
        elif key.endswith("prefix.scale"):
            parameter.data.fill_(1.0)
        elif not key.rpartition("gate.")[1]:
            trained(prefix)[key.replace("prefix.prefix", "prefix")].data.copy_(parameter.data)
    torch.testing.assert_close(logits(model, family), logits(prefix, family), rtol=0, atol=1e-5)


def test_gates_weigh_each_token_by_itself() -> None:
    gate = Gate(4, 3, torch.device("cpu"))
    tiny.randomise(gate)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(gate(x), torch.sigmoid(x @ gate.weight.T + gate.bias))
    torch.testing.assert_close(gate.log(1e3 * x), nn.functional.logsigmoid(1e3 * x @ gate.weight.T + gate.bias))


def test_unipelts_gates_scale_its_low_rank_changes_and_adapters() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
    change, adapter_of = unipelt._GatedLowRank(linear, 2), unipelt._GatedAdapter(6, 3, torch.device("cpu"))
    tiny.randomise(change)
    tiny.randomise(adapter_of)
    opened = torch.sigmoid(x @ change.gate.weight.T + change.gate.bias)
    assert 0.01 < opened.min() and opened.max() < 0.99  # neither shut nor open
    expected = linear(x) + opened * (x @ change.change.a.T @ change.change.b.T)
    torch.testing.assert_close(change(x, linear(x), linear), expected)
    opened = torch.sigmoid(x @ adapter_of.gate.weight.T + adapter_of.gate.bias)
    parts = dict(adapter_of.adapter.named_parameters())
    narrow = torch.relu(x @ parts["down.weight"].T + parts["down.bias"])
    torch.testing.assert_close(adapter_of(x), opened * (narrow @ parts["up.weight"].T + parts["up.bias"]))


QUERIES_AND_VALUES = {
    "llama": {"self_attn.q_proj", "self_attn.v_proj"},
    "bert": {"attention.self.query", "attention.self.value"},
    "t5": {f"layer.{place}.{leaf}" for place in ("0.SelfAttention", "1.EncDecAttention") for leaf in "qv"},
}


def changed(made: Backbone) -> set[str]:
    """The layers with low-rank changes, within their blocks."""
    paths = [f"{block.path}." for block in made.anatomy.blocks]
    names = {name.partition(".delta.")[0] for name in trained(made.model) if ".delta." in name}
    assert all(any(name.startswith(path) for path in paths) for name in names)
    return {name.removeprefix(path) for name in names for path in paths if name.startswith(path)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_low_rank_changes_are_of_queries_and_values(family: str) -> None:
    assert changed(tiny.adapted(family, "unipelt")[0]) == QUERIES_AND_VALUES[family]
    assert changed(six_layers(family)) == QUERIES_AND_VALUES[family], "S4"


@pytest.mark.parametrize("family", FAMILIES)
def test_unipelts_adapter_behind_an_open_gate_is_pfeiffers(family: str) -> None:
    """With all other gates closed."""
    model, pfeiffer = randomised_twin(family, "unipelt"), tiny.adapted(family, "pfeiffer", reduction=4)[0].model
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            module.weight.data.zero_()
            module.bias.data.fill_(OPEN if path.endswith("bottleneck.gate") else CLOSED)
    before = logits(pfeiffer, family)
    for name, parameter in trained(pfeiffer).items():
        parameter.data.copy_(trained(model)[name.replace(".bottleneck.", ".bottleneck.adapter.")].data)
    assert not torch.allclose(logits(pfeiffer, family), before, atol=1e-3)
    torch.testing.assert_close(logits(model, family), logits(pfeiffer, family), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "sizes"), [(2, [0, 1, 1, 0]), (6, [1, 2, 2, 1]), (12, [2, 4, 4, 2]), (24, [4, 8, 8, 4])]
)
def test_s4_groups_form_a_spindle(layers: int, sizes: list[int]) -> None:
    groups = [s4.group(layer, layers) for layer in range(layers)]
    assert groups == sorted(groups)
    assert [Counter(groups)[number] for number in range(4)] == sizes


def six_layers(family: str) -> Backbone:
    """A random model with S4 in it, deep enough for all of its groups."""
    config = tiny.configuration(family)
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 6)
    torch.manual_seed(0)
    made = backbone.skeleton(config, task=tiny.task(family), at="fp32")
    base.complete(tiny.method("s4"), made)
    return made


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_all_groups_of_s4_learn_and_come_back_the_same(family: str) -> None:
    made = six_layers(family)
    before, optimizer = logits(made.model, family), tiny.method("s4").optimizer(made.model.train(), 1e-2, 0.0)
    for _ in range(2):  # a low-rank change's first factor has a gradient once the second is not zero
        optimizer.zero_grad()
        tiny.loss_sum(made.model, tiny.batch(family)).backward()
        assert all(parameter.grad is not None for parameter in trained(made.model).values())
        optimizer.step()
    low_rank = [p.grad for name, p in trained(made.model).items() if ".delta." in name]
    assert low_rank and all(gradient is not None and gradient.any() for gradient in low_rank)
    after, again = logits(made.model, family), six_layers(family)
    assert not torch.allclose(before, after, atol=1e-4)
    again.model.load_state_dict(base.state(made.model), strict=False)
    assert torch.equal(logits(again.model, family), after)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_s4_trains_each_group_as_it_was_published(family: str) -> None:
    made = six_layers(family)
    published = [  # A adapter, P prefix, B bias, L LoRA
        {"bottleneck", "delta"},
        {"bottleneck", "prefix"},
        {"bottleneck", "prefix"},
        {"bottleneck", "prefix", "bias"},
        {"bottleneck", "prefix", "bias"},
        {"prefix", "bias", "delta"},
    ]
    for number, block in enumerate(made.anatomy.blocks):
        names = [n.removeprefix(block.path) for n in trained(made.model) if n.startswith(f"{block.path}.")]
        kinds = {
            next((k for k in ("bottleneck", "prefix", "delta") if f".{k}." in n), n.rpartition(".")[2]) for n in names
        }
        assert kinds == published[number % 6] - ({"bias"} if family == "t5" else set()), block.path
