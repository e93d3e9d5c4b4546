"""Fastfood against explicit Hadamard matrices in float64; the subspace that all layers share."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import adapter, step
from edgepeft.errors import UsageError
from edgepeft.methods.intrinsic_said import Subspace
from edgepeft.placements.fastfood import Fastfood, factors_of, hadamard
from edgepeft.trace import Tracker

CPU = torch.device("cpu")


def random(fastfood: Fastfood) -> tuple[Tensor, Tensor, Tensor]:
    """Signs, normal numbers and the permutation."""
    blocks = -(-fastfood.many // fastfood.size)
    signs, normal = fastfood._random(0, blocks, CPU)
    return signs.float(), normal, fastfood._order(CPU)


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_fast_transform_is_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    factors = [factor.double() for factor in factors_of(size, x.device)]
    torch.testing.assert_close(hadamard(x, factors), x @ sylvester(size))


@pytest.mark.parametrize(("few", "many"), [(8, 64), (5, 30), (7, 8), (12, 5), (1, 3)])
def test_it_is_the_product_of_the_paper(few: int, many: int) -> None:
    """Each block is H diag(g) Π H diag(b), scaled; what is missing to a whole block is padding."""
    fastfood = Fastfood(few, many, seed=3)
    signs, normal, order = random(fastfood)
    h, size = sylvester(fastfood.size), fastfood.size
    permutation = torch.eye(size, dtype=torch.float64)[order]
    blocks = [h @ g.double().diag() @ permutation @ h @ b.double().diag() for b, g in zip(signs, normal, strict=True)]
    dense = torch.cat(blocks)[:many, :few] / math.sqrt(size * many)
    vector, values = torch.randn(few), torch.randn(many)
    torch.testing.assert_close(fastfood.project(vector).double(), dense @ vector.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fastfood.transposed(values).double(), dense.T @ values.double(), rtol=1e-4, atol=1e-5)


def test_its_random_numbers_are_random() -> None:
    signs, normal, order = random(Fastfood(1024, 2**20, seed=1))
    count = math.sqrt(normal.numel())
    assert abs(signs.mean()) < 4 / count and abs((signs * normal).mean()) < 4 / count
    assert abs(normal.mean()) < 4 / count and abs(normal.var() - 1) < 4 * math.sqrt(2) / count
    assert abs(normal.pow(4).mean() - 3) < 4 * math.sqrt(96) / count
    assert (
        abs((normal[1:] * normal[:-1]).mean()) < 4 / count and abs((normal[:, 1:] * normal[:, :-1]).mean()) < 4 / count
    )
    assert torch.equal(order.sort().values, torch.arange(1024)) and not torch.equal(order, torch.arange(1024))
    other = random(Fastfood(1024, 2**20, seed=2))[1]
    assert abs((normal * other).mean()) < 4 / count


def test_it_keeps_lengths_and_mixes_all_directions() -> None:
    fastfood = Fastfood(100, 5000, seed=1)
    dense = torch.stack([fastfood.project(unit) for unit in torch.eye(100)], dim=1)
    gram = dense.T @ dense
    assert (gram - torch.eye(100)).abs().max() < 6 / math.sqrt(5000)
    assert torch.linalg.matrix_rank(dense) == 100


@pytest.mark.parametrize("scales", [True, False])
def test_gradients_are_those_of_the_dense_projection(scales: bool) -> None:
    torch.manual_seed(0)
    vector = nn.Parameter(torch.randn(6))
    scale = nn.Parameter(torch.tensor(1.3)) if scales else None
    change = Subspace(vector, scale, rows=5, fastfood=Fastfood(6, 35, seed=0))
    dense = torch.stack([change.fastfood.project(unit) for unit in torch.eye(6)], dim=1)
    x = torch.randn(2, 4, 7, requires_grad=True)
    weight = (dense @ vector).view(5, 7) * (1.0 if scale is None else scale)
    torch.testing.assert_close(change.weight(), weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change.change(x), F.linear(x, weight), rtol=1e-4, atol=1e-5)
    wanted = [x, vector, *([] if scale is None else [scale])]
    upstream = torch.randn(2, 4, 5)
    ours = torch.autograd.grad(change.change(x), wanted, upstream)
    theirs = torch.autograd.grad(F.linear(x, weight), wanted, upstream)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scales", "extra"), [(True, 14), (False, 0)])
def test_one_vector_for_all_layers(scales: bool, extra: int) -> None:
    made, _ = tiny.adapted("llama", "intrinsic_said", dimension=100, scales=scales)
    trained = adapter.trained(made.model)
    assert sum(parameter.numel() for parameter in trained.values()) == 100
    assert len(trained) == 1 + extra
    changes = [module for module in made.model.modules() if isinstance(module, Subspace)]
    assert len({id(module.vector) for module in changes}) == 1
    assert len({module.fastfood for module in changes}) == len(changes), "each has a projection of its own"


def test_another_seed_is_another_subspace() -> None:
    def logits(seed: int) -> Tensor:
        made, _ = tiny.adapted("llama", "intrinsic_said", seed=seed)
        tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
        return made.model(**step.inputs(tiny.batch("llama"))).logits

    assert torch.equal(logits(1), logits(1)) and not torch.allclose(logits(1), logits(2), atol=1e-2)


def test_nothing_of_the_size_of_a_weight_is_kept() -> None:
    change = Subspace(nn.Parameter(torch.randn(64)), None, 256, Fastfood(64, 256 * 256, seed=0))
    x = torch.randn(4, 256, requires_grad=True)
    tracker = Tracker(cuda=False)
    tracker.label(change.parameters(), "weights")
    with tracker.phase("forward"):
        kept = change.change(x)
        held = sum(tracker._bytes[uid] for uid in tracker._uid_of.values())
    assert kept.requires_grad and held < 16 * 256 * 4


def test_a_dimension_below_the_number_of_layers() -> None:
    with pytest.raises(UsageError, match="a dimension of 14 is too small") as caught:
        tiny.adapted("llama", "intrinsic_said", dimension=14)
    assert "15" in caught.value.remedy
