"""FAR against training of the same rows by hand, and its choice of nodes."""

from __future__ import annotations

import conformance
import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft.anatomy import FEED_FORWARD
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.placements import change
from edgepeft.placements.nodes import Nodes

RATE = 1e-3


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_nodes_are_trained_as_rows_of_a_dense_layer_are(family: str) -> None:
    """With torch's AdamW on dense weights, and gradients masked by hand."""
    batches = [tiny.batch(family, seed=seed) for seed in range(5)]
    made, method = tiny.load(family), tiny.method("far", retention=0.25)
    base.apply(method, made)
    first, last = method.stages()
    conformance.train(made.model, method, first, batches[0], 3)
    moved: dict[str, Tensor] = {}
    primed: dict[str, Tensor] = {}
    owner = {id(module): name for name, module in made.model.named_modules()}
    for place in change.changed(made.model):
        assert isinstance(place.change, change.Dense)
        name, distance = owner[id(place.owners[0][0])], place.change.delta.detach().abs()
        primed[f"{name}.{place.owners[0][1]}"] = place.change.delta.detach().clone()
        moved[name] = moved.get(name, torch.zeros(())) + (distance.sum(1) if distance.dim() > 1 else distance)
    base.begin(method, made, 1)
    names = made.anatomy.linears(FEED_FORWARD)
    assert sorted(moved) == sorted(names)
    chosen = {name: made.model.get_submodule(f"{name}.delta").get_buffer("nodes") for name in names}
    for name, nodes in chosen.items():
        assert torch.equal(nodes, moved[name].topk(round(0.25 * len(moved[name]))).indices.sort().values)

    plain = tiny.load(family)
    start = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    fresh = {name: made.model.get_parameter(name) for name in sorted(made.fresh)}  # went on in the first stage
    trained = [plain.model.get_parameter(name).requires_grad_(True) for name in fresh]
    with torch.no_grad():
        for there, here in zip(trained, fresh.values(), strict=True):
            there.copy_(here)
    masks: list[tuple[nn.Parameter, Tensor]] = []
    for name, nodes in chosen.items():
        for leaf, parameter in plain.model.get_submodule(name).named_parameters():
            mask = torch.zeros_like(parameter)
            mask[nodes] = 1
            parameter.data.addcmul_(mask, primed[f"{name}.{leaf}"])  # learners go on from where priming left them
            masks.append((parameter.requires_grad_(True), mask))
    optimizer = last.optimizer(made.model, RATE, 0.0)
    dense = torch.optim.AdamW([*trained, *(p for p, _ in masks)], lr=RATE, weight_decay=0.0)
    for batch in batches:
        tiny.loss_sum(made.model, batch).backward()
        tiny.loss_sum(plain.model, batch).backward()
        for parameter, mask in masks:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    method.merge(made.model)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(made.model.get_parameter(name), parameter, rtol=1e-4, atol=2e-5)
        assert torch.equal(parameter, start[name]) == (not parameter.requires_grad)


def test_a_quarter_of_the_feed_forward_layers_is_trained() -> None:
    made, _ = tiny.adapted("bert", "far", retention=0.25)
    trained = sum(p.numel() for m in made.model.modules() if isinstance(m, Nodes) for p in m.parameters())
    assert trained == 2 * (16 * (32 + 1) + 8 * (64 + 1))  # layers × (in + out), a bias each


@pytest.mark.parametrize("option", ["retention", "priming"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shares_are_checked(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        base.create("far", {option: value})
