"""What every method must do on every family: train, survive saving, and merge or refuse to.

A new method file is covered by being there.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from edgepeft import adapter, precision, step
from edgepeft.errors import UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.merge import relative_difference, to_full_precision
from edgepeft.methods import base
from edgepeft.methods.base import Method, NotMergeable

UPDATES = 12
CASES = [
    (family, name, at)
    for name in base.names()
    for family in tiny.FAMILIES
    for at in ("fp32", "nf4")
    if not (base.find(name).writes_backbone and precision.is_packed(at))
    if at == "fp32" or family in ("llama", "gpt2", "bert", "t5")
]


def train(model: nn.Module, method: Method, batch: step.Batch, updates: int) -> list[float]:
    """The losses of updates on one batch."""
    rate = 10 * method.learning_rate
    trainer = step.TrainingStep(
        model,
        method.stages()[-1].optimizer(model, rate, 0.0),
        clip_norm=None if method.updates_in_backward else 1.0,
        penalty=method.penalty,
        after_update=method.after_update,
    )
    losses = []
    model.train()
    for _ in range(updates):
        losses.append(trainer.backward([batch], rate).item())
        trainer.update(len(losses) / updates)
    model.eval()
    return losses


@pytest.mark.parametrize(("family", "name", "at"), CASES)
def test_conformance(family: str, name: str, at: str, tmp_path: Path) -> None:
    made, method = tiny.adapted(family, name, at)
    model, batch = made.model, tiny.batch(family)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    losses = train(model, method, batch, UPDATES)
    assert losses[-1] < 0.995 * losses[0] and min(losses) == pytest.approx(losses[-1], rel=0.02)
    for n, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[n]), f"{n} is frozen and changed"

    card = adapter.card(method, model="m", task=made.task, precision=at, labels=None, seed=0)
    adapter.save(tmp_path / "adapter", model, card)
    again, same = tiny.adapted(family, name, at)
    assert adapter.read_card(tmp_path / "adapter").method == same.name == name
    adapter.load(tmp_path / "adapter", again.model)
    before = sample_logits(model, [batch])
    assert torch.equal(sample_logits(again.model.eval(), [batch])[0], before[0])

    if not method.merges:
        with pytest.raises(NotMergeable):
            method.merge(model)
        return
    to_full_precision(model)
    before = sample_logits(model, [batch])
    method.merge(model)
    assert relative_difference(before, sample_logits(model, [batch])) < 1e-5
    assert structure(model) == structure(tiny.load(family).model), "the plain modules it started with"
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def structure(model: nn.Module) -> tuple[dict[str, type], dict[str, tuple[int, ...]]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: type(module) for name, module in model.named_modules()}, shapes


@pytest.mark.parametrize("name", base.names())
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_every_trained_tensor_gets_a_gradient(family: str, name: str) -> None:
    """Once what starts at zero has moved."""
    made, _ = tiny.adapted(family, name)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    step.loss_sum(made.model, tiny.batch(family)).backward()
    for n, parameter in adapter.trained(made.model).items():
        assert parameter.grad is not None and parameter.grad.any(), n


@pytest.mark.parametrize("name", base.names())
@pytest.mark.parametrize("at", ["fp32", "bf16"])
def test_a_copy_of_a_model_is_a_model_of_its_own(name: str, at: str) -> None:
    made, _ = tiny.adapted("llama", name, at)
    batch = tiny.batch("llama")
    twin = copy.deepcopy(made.model)
    assert torch.equal(sample_logits(twin, [batch])[0], sample_logits(made.model, [batch])[0])
    before = sample_logits(made.model, [batch])[0]
    tiny.randomise(nn.ParameterList(adapter.trained(twin).values()), seed=3)
    assert torch.equal(sample_logits(made.model, [batch])[0], before)
    assert not torch.equal(sample_logits(twin, [batch])[0], before)
    step.loss_sum(twin, batch).backward()
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.parametrize("name", base.names())
def test_adapter_names_do_not_depend_on_precision(name: str) -> None:
    found = []
    for at in ("fp32", "bf16", *(("nf4",) if not base.find(name).writes_backbone else ())):
        made, _ = tiny.adapted("bert", name, at)
        found.append({n: tuple(p.shape) for n, p in adapter.trained(made.model).items()})
    assert all(names == found[0] for names in found)


@pytest.mark.parametrize("name", base.names())
@pytest.mark.parametrize("family", ["llama", "t5-gated", "gpt2", "bert"])
def test_recomputed_activations_give_the_same_gradients(family: str, name: str) -> None:
    def gradients(again: bool) -> dict[str, torch.Tensor]:
        made, _ = tiny.adapted(family, name)
        tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
        made.model.train()
        if again:
            made.model.activation_checkpointing_enable()
        step.loss_sum(made.model, tiny.batch(family)).backward()
        return {n: p.grad for n, p in adapter.trained(made.model).items() if p.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    for n, gradient in kept.items():
        torch.testing.assert_close(recomputed[n], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("name", base.names())
def test_a_method_says_where_it_is_from(name: str) -> None:
    method = base.create(name)
    assert method.name == name and method.learning_rate > 0
    assert method.kind in ("additive", "selective", "reparametrised", "hybrid")
    assert method.paper.title and 1990 < method.paper.year < 2030 and len(method.paper.arxiv.split(".")) == 2


def test_names_aliases_and_dotted_paths() -> None:
    assert base.find("qlora") is base.find("lora") is base.find("edgepeft.methods.lora")
    assert base.implied_precision("qlora") == "nf4" and base.implied_precision("lora") is None
    assert base.create("qlora", {"rank": 2}).name == "lora"


STRANGER = '''
from dataclasses import dataclass
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import selection

@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases."""

    paper = Paper("BitFit", 2021, "2106.10199")
    kind = "selective"

    def inject(self, model, anatomy):
        selection.train(model, [name for name, _ in model.named_parameters() if name.endswith(".bias")])
'''


def test_a_strangers_method_works_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "bitfit.py").write_text(STRANGER)
    (tmp_path / "strange" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    made, method = tiny.adapted("bert", "strange.bitfit")
    assert method.name == "strange.bitfit"
    assert {name.rpartition(".")[2] for name in adapter.trained(made.model)} == {"bias", "weight"}
    losses = train(made.model, method, tiny.batch("bert"), 5)
    assert losses[-1] < losses[0]
    with pytest.raises(UsageError, match="holds 0 methods"):
        base.find("strange.empty")
    with pytest.raises(UsageError, match="There is no method 'strange.nothing'"):
        base.find("strange.nothing")


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="There is no method 'loar'") as caught:
        base.create("loar")
    assert "lora" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lora", {"ranks": 4}, "Did you mean rank"),
        ("lora", {"rank": 4.0}, "rank = 4.0 is not of type int"),
        ("lora", {"rank": True}, "rank = True is not of type int"),
        ("lora", {"alpha": True}, "alpha = True is not of type float"),
        ("lora", {"targets": "query"}, "targets = 'query' is not of type tuple"),
        ("lora", {"targets": [1]}, "targets = (1,) is not of type tuple"),
        ("lora", {"rank": 0}, "rank = 0 must be at least 1"),
        ("lora", {"dropout": 1.0}, "dropout = 1.0 must be a probability below 1"),
        ("galore", {"rank": 0}, "rank = 0 must be at least 1"),
        ("galore", {"period": 0}, "period = 0 must be at least 1"),
        ("lst", {"layers": 0.0}, "layers = 0.0 must be a share"),
        ("lst", {"layers": 1.5}, "layers = 1.5 must be a share"),
        ("full", {"rank": 4}, "It has none."),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        base.create(name, options)
    assert part in str(caught.value)


def test_whole_numbers_are_floats_too_and_lists_are_tuples() -> None:
    method = base.create("lora", {"alpha": 4, "targets": ["query"]})
    assert getattr(method, "alpha") == 4 and getattr(method, "targets") == ("query",)  # noqa: B009


@pytest.mark.parametrize("name", ["full", "galore"])
@pytest.mark.parametrize("at", ["nf4", "int8"])
def test_packed_weights_cannot_be_written(name: str, at: str) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot train on {at} weights") as caught:
        tiny.adapted("llama", name, at)
    assert "lora" in caught.value.remedy


def test_a_new_head_is_trained_with_every_method_in_the_same_order_everywhere() -> None:
    """In half precision the order of the parameters follows the order in which they become trainable."""
    orders = []
    for fresh in (["classifier.weight", "classifier.bias"], ["classifier.bias", "classifier.weight"]):
        made = tiny.load("bert", "bf16")
        assert made.fresh == set(fresh)
        shuffled = type("Ordered", (frozenset,), {"__iter__": lambda self, order=fresh: iter(order)})(fresh)
        object.__setattr__(made, "fresh", shuffled)
        base.apply(tiny.method("ln_tuning"), made)
        orders.append(list(adapter.trained(made.model)))
    assert orders[0] == orders[1]
    assert {"classifier.weight", "classifier.bias"} <= set(orders[0])
