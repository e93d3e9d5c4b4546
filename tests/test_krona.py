"""The Kronecker product against ``torch.kron`` in float64 and HF PEFT's LoKr."""

from __future__ import annotations

import peft_twin
import pytest
import tiny
import torch
from peft import LoKrConfig

from edgepeft.methods.krona_res import Residual
from edgepeft.placements import kronecker
from edgepeft.trace import Tracker

CPU = torch.device("cpu")
LEAVES = {"a": "lokr_w1", "b": "lokr_w2_a", "inner": "lokr_w2_b"}


@pytest.mark.parametrize(("wide_in", "wide_out"), [(12, 12), (12, 40), (40, 12), (7, 30), (64, 8), (8, 64)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_it_is_the_dense_product(wide_in: int, wide_out: int, rank: int) -> None:
    """Both orders of multiplication are among these shapes."""
    torch.manual_seed(0)
    product = kronecker.Product(wide_in, wide_out, rank, 1.5, CPU).double()
    tiny.randomise(product)
    b = product.b if product.inner is None else product.b @ product.inner
    dense = 1.5 * torch.kron(product.a, b)
    assert tuple(dense.shape) == (wide_out, wide_in)
    torch.testing.assert_close(product.dense(), dense)
    x = torch.randn(2, 3, wide_in, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, wide_out, dtype=torch.float64)
    torch.testing.assert_close(product(x), x @ dense.t())
    ours = torch.autograd.grad(product(x), [x, *product.parameters()], upstream)
    theirs = torch.autograd.grad(x @ dense.t(), [x, *product.parameters()], upstream)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_with_a_rank_it_is_pefts_lokr(family: str) -> None:
    """At a rank that PEFT takes as one: below half of the larger factors."""
    roles = ("query", "key", "value", "output", "cross_query", "cross_value", "ffn_in", "ffn_out")
    made, method = tiny.adapted(family, "krona", rank=2, scale=2.5, targets=roles)
    config = LoKrConfig(r=2, alpha=5, target_modules=made.anatomy.linears(roles))

    def theirs_of(name: str) -> str:
        path, _, leaf = name.partition(".delta.product.")
        return f"{path}.{LEAVES[leaf]}.default"

    peft_twin.compare(family, made, method, config, theirs_of)


def test_the_rank_of_the_change_is_the_product_of_the_factors_ranks() -> None:
    product = kronecker.Product(64, 64, 0, 1.0, CPU)
    tiny.randomise(product)
    assert torch.linalg.matrix_rank(product.dense()) == 64 and sum(p.numel() for p in product.parameters()) == 128


@pytest.mark.parametrize(("size", "factors"), [(1024, (32, 32)), (2048, (32, 64)), (768, (24, 32)), (13, (1, 13))])
def test_sizes_are_split_as_squarely_as_they_allow(size: int, factors: tuple[int, int]) -> None:
    assert kronecker.split(size) == factors


def test_the_dense_product_is_never_formed() -> None:
    product = kronecker.Product(1024, 1024, 0, 1.0, CPU)
    x = torch.randn(4, 1024, requires_grad=True)
    tracker = Tracker(cuda=False)
    tracker.label(product.parameters(), "weights")
    with tracker.phase("both"):
        product(x).sum().backward()
    assert tracker.peaks()["both"].peak_bytes < 64 * 1024 * 4, "the dense one has 1024 rows"


def test_the_residual_is_part_of_what_is_added() -> None:
    module = Residual(kronecker.Product(12, 12, 0, 1.0, CPU))
    x = torch.randn(3, 12)
    assert not module(x).any(), "it starts at zero"
    tiny.randomise(module)
    torch.testing.assert_close(module(x), x @ module.product.dense().t() + module.residual * x)
