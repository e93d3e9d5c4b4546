"""Sparse and dense changes of weights against explicit masks, torch.optim and plain algebra."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import conformance
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import adapter, step
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.methods import base
from edgepeft.placements import change, selection, sparse

RATE = 1e-3


def own(model: nn.Module, made: Any) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in selection.own(model, made.anatomy)}


def maskable(model: Any, made: Any) -> dict[str, nn.Parameter]:
    """What LT-SFT chooses from: ``own`` without norms and the matrix of token logits."""
    head = model.get_output_embeddings()
    norms = tuple(f"{norm}." for norm in made.anatomy.norms)
    wanted = {name: tensor for name, tensor in own(model, made).items() if not name.startswith(norms)}
    return {name: tensor for name, tensor in wanted.items() if head is None or tensor is not head.weight}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_lt_sft_is_full_tuning_a_mask_of_what_moved_most_and_masked_tuning(family: str) -> None:
    """The whole method against torch's AdamW on dense weights, with gradients masked by hand."""
    batches = [tiny.batch(family, seed=seed) for seed in range(5)]
    made, method = tiny.load(family), tiny.method("lt_sft", density=0.05)
    base.apply(method, made)
    for number, stage in enumerate(method.stages()):
        if number:
            base.begin(method, made, number)
        optimizer = stage.optimizer(made.model, RATE, 0.0)
        for batch in batches:
            tiny.loss_sum(made.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    method.merge(made.model)

    plain = tiny.load(family)
    weights = maskable(plain.model, plain)
    head = [plain.model.get_parameter(name) for name in sorted(plain.fresh)]
    for parameter in (*weights.values(), *head):
        parameter.requires_grad_(True)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    masks: dict[str, Tensor] = {}
    for number in range(2):
        if number:
            moved = flat(weights).sub(flat(start)).abs()
            threshold = moved.topk(round(0.05 * len(moved))).values[-1]
            masks = {name: (weight.detach() - start[name]).abs() >= threshold for name, weight in weights.items()}
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(start[name])
        optimizer = torch.optim.AdamW([*weights.values(), *head], lr=RATE, weight_decay=0.0)
        for batch in batches:
            tiny.loss_sum(plain.model, batch).backward()
            for name, mask in masks.items():
                grad = weights[name].grad
                assert grad is not None
                grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
    changed_here, changed_there = flat(maskable(made.model, made)) != flat(start), flat(weights) != flat(start)
    assert (changed_here != changed_there).float().mean() < 1e-4  # where two entries moved as far, to rounding
    both = changed_here & changed_there
    assert 0.03 < both.float().mean() < 0.051
    torch.testing.assert_close(flat(maskable(made.model, made))[both], flat(weights)[both], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fisher_adds_up_the_squared_gradients_of_the_log_likelihood_of_single_examples(family: str) -> None:
    """Of a whole answer, the sum over its tokens (equation 3 of the paper)."""
    made, method = tiny.load(family), tiny.method("fish_mask", density=0.1)
    base.apply(method, made)
    batches = [tiny.batch(family, 1, seed=seed) for seed in range(6)]
    measuring = method.stages()[0]
    trainer = step.TrainingStep(
        made.model, measuring.optimizer(made.model, 1.0, 0.1), clip_norm=None, summed=measuring.one_by_one
    )
    before = copy.deepcopy(made.model.state_dict())
    for batch in batches:
        trainer.backward([batch], 1.0)
        trainer.update()
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name]), "measuring does not train"

    plain = tiny.load(family)
    weights = own(plain.model, plain)
    for weight in weights.values():
        weight.requires_grad_(True)
    squares = []
    for batch in batches:
        gradients = torch.autograd.grad(tiny.loss_sum(plain.model, batch), list(weights.values()))
        squares.append(torch.cat([gradient.flatten() for gradient in gradients]).square())
    expected = torch.stack(squares).sum(0)
    fisher = torch.cat([total.flatten() for total in made.model.get_submodule("fisher").buffers()])
    torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-9)
    base.begin(method, made, 1)
    positions = made.model.get_buffer("sparse.positions").long()
    assert len(positions) == round(0.1 * len(expected))
    assert expected[positions].min() >= fisher.topk(len(positions)).values[-1] * (1 - 1e-4)


@pytest.mark.parametrize("at", ["fp32", "bf16"])
def test_nothing_dense_is_kept_for_a_sparse_change(at: str) -> None:
    """Saved for backward: what a frozen model saves anyway, and the values."""

    def saved(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():  # not the positions: there are as many as values
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = tiny.loss_sum(model, batch)
        del loss
        return sum(size for pointer, size in sizes.items() if pointer not in known)

    batch = tiny.batch("llama", 1, lengths=(4, 4))
    made, _ = tiny.adapted("llama", "lt_sft", at)
    full, _ = tiny.adapted("llama", "full", at)
    conformance.randomised(made.model)
    linears = sum(m.in_features * m.out_features for m in full.model.modules() if isinstance(m, nn.Linear))
    head = full.model.get_parameter("lm_head.weight").nbytes * 2  # what the loss keeps of its gradient
    assert saved(made.model) <= saved(full.model) + head
    assert saved(made.model) < linears * full.model.lm_head.weight.element_size()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_of_a_changed_layer_are_those_of_plain_algebra(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = nn.Sequential(layer)
    (place,) = change.places(model, ["0.weight"])
    if kind == "dense":
        made = change.Dense(place.tensor)
        made.delta = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        change.put(place, made)
        trained, dense = made.delta, made.delta.detach()
    else:
        sparse.keep(model, [place], 0.3, lambda place: place.tensor.abs())
        root: Any = model.get_submodule("sparse")
        root.values = nn.Parameter(torch.randn(6, dtype=torch.float64))
        trained, dense = root.values, torch.zeros(20, dtype=torch.float64)
        dense[root.positions.long()] = trained.detach()
        dense = dense.view(4, 5)
        expected_positions = weight.abs().flatten().topk(6).indices.sort().values
        assert torch.equal(root.positions.long(), expected_positions)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, weight + dense, bias))
    to_x, to_trained = torch.autograd.grad(out, [x, trained], g)
    torch.testing.assert_close(to_x, g @ (weight + dense))
    whole = torch.einsum("bto,bti->oi", g, x.detach())
    torch.testing.assert_close(to_trained, whole if kind == "dense" else whole.flatten()[root.positions.long()])
    (change.fold if kind == "dense" else sparse.fold)(model)
    assert type(model[0]) is nn.Linear and [name for name, _ in model.named_modules()] == ["", "0"]
    torch.testing.assert_close(layer.weight.detach(), weight + dense)


def test_tied_embeddings_change_together() -> None:
    made, method = tiny.adapted("t5", "fish_mask", density=0.5)  # entries of all tensors
    model: Any = made.model
    conformance.randomised(model)
    assert torch.equal(model.shared.weight, model.lm_head.weight)
    assert not torch.equal(model.shared.weight, tiny.load("t5").model.shared.weight)
    before = model.shared.weight.detach().clone()
    method.merge(model)
    assert model.lm_head.weight is model.shared.weight and torch.equal(model.shared.weight, before)


def test_the_highest_of_many_tensors() -> None:
    torch.manual_seed(0)
    tensors = [torch.rand(shape) for shape in ((3, 4), (50,), (2, 2, 2), (1,))]
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    for count in (1, 13, 70, 71):
        found = sparse.highest(iter(tensors), count)
        assert torch.equal(found, whole.topk(count).indices.sort().values)


def test_an_adapter_is_values_and_positions_and_foreign_positions_are_refused(tmp_path: Any) -> None:
    made, method = tiny.adapted("llama", "fish_mask")
    assert adapter.trained(made.model).keys() == {"sparse.values"}
    assert base.state(made.model).keys() == {"sparse.values", "sparse.positions"}
    positions = made.model.get_buffer("sparse.positions")
    whole = positions.clone()
    assert positions.dtype is torch.int32
    for damage in (lambda: positions.add_(10**6), lambda: positions.fill_(3), lambda: positions.sub_(10**6)):
        damage()
        with pytest.raises(EdgePeftError, match="positions of a sparse change"):
            tiny.loss_sum(made.model, tiny.batch("llama"))
        positions.copy_(whole)
    tiny.loss_sum(made.model, tiny.batch("llama"))


@pytest.mark.parametrize("name", ["lt_sft", "fish_mask", "diff_pruning"])
@pytest.mark.parametrize("density", [0.0, 1.0, -0.1])
def test_densities_are_shares(name: str, density: float) -> None:
    with pytest.raises(UsageError, match="density"):
        base.create(name, {"density": density})
