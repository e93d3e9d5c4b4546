"""Hard-concrete gates against finite differences in float64, and what is left when they are dropped."""

from __future__ import annotations

from typing import Any

import conformance
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from edgepeft import step
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.placements import change, selection
from edgepeft.placements.gated import Gated, expected_open

AT = "0.parametrizations.weight.0"


def gated(start: float = 0.3) -> tuple[nn.Sequential, Gated]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    (place,) = change.places(model, ["0.weight"])
    made = Gated(place.tensor, start=start, stretch=1.5)
    made.delta = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    made.gate = nn.Parameter(start + torch.randn(4, 5, dtype=torch.float64))
    change.put(place, made)
    return model.train(), made


def test_gradients_are_those_of_finite_differences_with_the_same_noise() -> None:
    model, made = gated()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, delta: Tensor, gate: Tensor) -> Tensor:
        torch.manual_seed(7)
        found: Tensor = functional_call(model, {f"{AT}.delta": delta, f"{AT}.gate": gate}, (x,))
        return found

    assert torch.autograd.gradcheck(function, (x, made.delta, made.gate), eps=1e-7, atol=1e-6)


def test_a_layer_computes_what_the_paper_writes_down() -> None:
    """z = min(1, max(0, s (r − l) + l)), s = sigmoid(log u − log(1 − u) + a), l = −1.5 and r = 1.5."""
    model, made = gated()
    part: Any = model[0]
    original = part.parametrizations.weight.original
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    u = torch.rand(4, 5, dtype=torch.float64)
    s = torch.sigmoid(u.log() - (1 - u).log() + made.gate)
    z = (s * 3 - 1.5).clamp(0, 1)
    assert 0 < (z == 0).sum() and 0 < (z == 1).sum() and 0 < ((z > 0) & (z < 1)).sum()
    torch.testing.assert_close(found, F.linear(x, original + z * made.delta, part.bias))
    settled = (torch.sigmoid(made.gate) * 3 - 1.5).clamp(0, 1) * made.delta
    torch.testing.assert_close(model.eval()(x), F.linear(x, original + settled, part.bias))
    torch.testing.assert_close(made.settled(), settled.detach())


def test_noise_is_drawn_anew_in_each_pass_and_goes_on_after_backward() -> None:
    model, _ = gated()
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(3)
    first = model(x)
    state = torch.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), first)


def test_the_price_is_that_of_the_gates_expected_to_be_open() -> None:
    """Against a count of many draws, and finite differences."""
    gate = torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True)
    u = torch.rand(200_000, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    opened = (torch.logit(u) + gate.detach() > 0).double().mean(0)
    assert float(expected_open(gate.detach())) == pytest.approx(float(opened.sum()), abs=0.02)
    assert torch.autograd.gradcheck(expected_open, (gate,))


def test_penalty_covers_all_gates_and_ends_with_them() -> None:
    made, method, _ = next(conformance.stages("bert", "diff_pruning"))
    batch = tiny.batch("bert")
    weights = sum(module.gate.numel() for module in made.model.modules() if isinstance(module, Gated))
    found = method.penalty(made.model, batch, torch.zeros(()))
    assert found is not None and float(found) == pytest.approx(
        1.25e-7 * weights * float(torch.sigmoid(torch.tensor(5.0))), rel=1e-5
    )
    plain = tiny.load("bert")
    assert weights == sum(plain.model.get_parameter(n).numel() for n in selection.own(plain.model, plain.anatomy))
    base.begin(method, made, 1)
    assert method.penalty(made.model, batch, torch.zeros(())) is None


def test_gates_learn_at_their_own_rate() -> None:
    made, method, stage = next(conformance.stages("bert", "diff_pruning"))
    trainer = step.TrainingStep(
        made.model, stage.optimizer(made.model, 1e-3, 0.0), clip_norm=None, penalty=method.penalty
    )
    trainer.backward([tiny.batch("bert")], 5e-4)  # half of the highest
    rest, gates = trainer.optimizer.param_groups
    assert rest["lr"] == 5e-4 and gates["lr"] == pytest.approx(0.05)
    assert {id(p) for p in gates["params"]} == {id(m.gate) for m in made.model.modules() if isinstance(m, Gated)}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_pruning_keeps_the_largest_gated_changes_and_their_values(family: str) -> None:
    run = conformance.stages(family, "diff_pruning")
    made, method, _ = next(run)
    conformance.randomised(made.model)
    settled = []
    for place in change.changed(made.model):
        assert isinstance(place.change, Gated)
        settled.append(place.change.settled().flatten())
    whole = torch.cat(settled)
    next(run)
    positions, values = made.model.get_buffer("sparse.positions").long(), made.model.get_parameter("sparse.values")
    assert len(positions) == round(0.2 * len(whole))
    assert torch.equal(values.detach(), whole[positions])
    assert whole[positions].abs().min() >= whole.abs().sort(descending=True).values[len(positions) - 1]


def test_the_default_price_closes_gates_though_gradients_are_clipped() -> None:
    """Clipped together with the changes, whose gradients are far larger, the gates of this model hardly move."""
    made, method, stage = next(conformance.stages("bert", "diff_pruning"))
    conformance.train(made.model, method, stage, tiny.batch("bert"), 200)
    gates = torch.cat([m.gate.detach().flatten() for m in made.model.modules() if isinstance(m, Gated)])
    assert (gates <= 0).float().mean() > 0.02


def test_price_closes_gates() -> None:
    """At a high price nearly all of them, in a few updates."""
    made, method = tiny.load("bert"), tiny.method("diff_pruning", price=1.0)
    base.apply(method, made)
    stage = method.stages()[0]
    conformance.train(made.model, method, stage, tiny.batch("bert"), 60)
    gates = torch.cat([m.gate.detach().flatten() for m in made.model.modules() if isinstance(m, Gated)])
    assert gates.mean() < 0.5 * 5.0


@pytest.mark.parametrize(("option", "value"), [("density", 0.0), ("price", -1.0), ("stretch", 0.5), ("gate_rate", 0.0)])
def test_options_are_checked(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        base.create("diff_pruning", {option: value})
