"""Sums of Kronecker products against torch.kron in float64, and small matrices that all layers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import adapter
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.placements.hypercomplex import Hypercomplex, LowRankHypercomplex, kronecker_sum, rule

SHARED = ("compacter", "compacter_pp")


def by_kron(a: Tensor, b: Tensor) -> Tensor:
    """Σᵢ Aᵢ ⊗ Bᵢ, (in, out)."""
    total = torch.kron(a[0], b[0])
    for small, large in zip(a[1:], b[1:], strict=True):
        total = total + torch.kron(small, large)
    return total


@pytest.mark.parametrize(("n", "wide_in", "wide_out"), [(1, 6, 4), (2, 6, 4), (4, 8, 12), (3, 3, 9)])
def test_the_sum_and_its_gradients(n: int, wide_in: int, wide_out: int) -> None:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, n, generator=random, dtype=torch.float64, requires_grad=True)
    b = torch.randn(n, wide_in // n, wide_out // n, generator=random, dtype=torch.float64, requires_grad=True)
    found, expected = kronecker_sum(a, b), by_kron(a, b).T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    toward = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    mine = torch.autograd.grad((found * toward).sum(), (a, b))
    for one, other in zip(mine, torch.autograd.grad((expected * toward).sum(), (a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_layers_compute_x_w_plus_b(rank: int) -> None:
    shared = rule(4, torch.device("cpu"))
    layer = LowRankHypercomplex(shared, 16, 8, rank) if rank else Hypercomplex(shared, 16, 8)
    tiny.randomise(layer)
    layer.double()
    factor = layer.get_parameter("left") @ layer.get_parameter("right") if rank else layer.get_parameter("factor")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = x @ by_kron(layer.rule, factor) + layer.get_parameter("bias")
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(factor).max() <= (rank or 2)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_all_layers_share_one_rule_that_is_saved_once(family: str, name: str, tmp_path: Path) -> None:
    made, method = tiny.adapted(family, name)
    layers = [module for module in made.model.modules() if isinstance(module, LowRankHypercomplex)]
    blocks = len(made.anatomy.blocks)
    assert len(layers) == blocks * (4 if name == "compacter" else 2)
    assert len({id(layer.rule) for layer in layers}) == 1
    n, size = 2, 4
    of_adapters = n**3 + len(layers) // 2 * (2 * (32 + size) + size + 32)
    fresh = sum(made.model.get_parameter(each).numel() for each in made.fresh)
    assert sum(p.numel() for p in adapter.trained(made.model).values()) == of_adapters + fresh

    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    card = adapter.card(method, model="m", task=made.task, precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "adapter", made.model, card)
    stored = adapter.read_tensors(tmp_path / "adapter" / adapter.TENSORS)
    assert [each for each in stored if each.endswith(".rule")] == [next(each for each in stored if "rule" in each)]
    again, _ = tiny.adapted(family, name)
    adapter.load(tmp_path / "adapter", again.model)
    for module in again.model.modules():
        assert not isinstance(module, LowRankHypercomplex) or torch.equal(module.rule, layers[0].rule)


def test_a_phm_adapter_has_rules_of_its_own() -> None:
    made, _ = tiny.adapted("llama", "phm_adapter")
    layers = [module for module in made.model.modules() if isinstance(module, Hypercomplex)]
    assert len(layers) == len({id(layer.rule) for layer in layers}) == 2 * 2 * 2
    trained = sum(p.numel() for p in adapter.trained(made.model).values())
    assert trained == 2 * 2 * (2 * (32 * 4 // 2 + 2**3) + 4 + 32)


@pytest.mark.parametrize("name", ["phm_adapter", *SHARED])
@pytest.mark.parametrize("options", [{"reduction": 8, "n": 3}, {"reduction": 32, "n": 2}])
def test_n_must_divide_both_widths(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot work with n = {options['n']} on this model") as caught:
        base.apply(base.create(name, options), tiny.load("bert"))
    size = 32 // options["reduction"]
    assert f"hidden size, 32, and the bottleneck, {size}" in caught.value.cause
    fitting = [d for d in (1, 2, 4) if size % d == 0]
    assert caught.value.cause.endswith(f"be one of {', '.join(map(str, fitting))}.")
    assert caught.value.remedy.startswith(f"Use --set options.n={max(d for d in fitting if d <= options['n'])},")
