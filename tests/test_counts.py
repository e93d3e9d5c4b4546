"""What changed is counted as dense algebra says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from conformance import home, randomised
from torch import Tensor, nn

from edgepeft import adapter, counts
from edgepeft.methods import base


@pytest.mark.parametrize("rank", [1, 3, 8, 31])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_rank_of_a_change_that_was_rounded(rank: int, size: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96) * 0.1
    delta = torch.randn(48, rank) @ torch.randn(rank, 96) * size / 10
    changed = weight + delta
    assert torch.linalg.matrix_rank((changed - weight).double()) == 48, "rounding alone has full rank"
    assert counts.rank_of_change(weight, changed) == rank


def test_ranks_are_told_apart_up_to_a_limit() -> None:
    torch.manual_seed(0)
    assert counts.rank_of_change(torch.zeros(300, 310), torch.randn(300, 310)) == counts.RANKS


@pytest.mark.parametrize("rank", [5, counts.RANKS])
def test_the_rank_of_a_matrix_of_several_blocks(rank: int) -> None:
    torch.manual_seed(0)
    rows = 2 * counts.ROWS + 7
    weight = torch.randn(rows, 300) * 0.1
    changed = weight + torch.randn(rows, rank) @ torch.randn(rank, 300) / 10
    assert counts.rank_of_change(weight, changed) == rank


def pairs(before: nn.Module, after: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    others = dict(after.named_parameters())
    return ((old, others[name]) for name, old in before.named_parameters())


@pytest.mark.parametrize(
    ("name", "options", "rank"),
    [("lora", {"rank": 3, "targets": ("query",)}, 3), ("ln_tuning", {}, 0), ("full", {}, 32)],
)
def test_changed_parameters_of_a_merged_model(name: str, options: dict[str, Any], rank: int) -> None:
    made, method = tiny.adapted("llama", name, **options)
    randomised(made.model, seed=5)
    method.merge(made.model)
    plain = tiny.load("llama").model
    found = counts.change(pairs(plain, made.model))
    sizes = {n: p.numel() for n, p in plain.named_parameters()}
    changed = {
        "lora": [n for n in sizes if n.endswith("q_proj.weight")],
        "ln_tuning": [n for n in sizes if "norm" in n],
        "full": list(sizes),
    }[name]
    assert found == counts.Change(sum(sizes[n] for n in changed), rank)


def test_nothing_changed() -> None:
    model: nn.Module = tiny.load("bert").model
    assert counts.change(pairs(model, copy.deepcopy(model))) == counts.Change(0, 0)


def test_what_stays_beside_the_backbone_is_counted_whole() -> None:
    made, _ = tiny.adapted("bert", "houlsby")
    randomised(made.model, seed=5)
    plain = tiny.load("bert").model
    state = base.state(made.model)
    beside = sum(tensor.numel() for name, tensor in state.items() if not name.startswith("classifier"))
    head = sum(tensor.numel() for name, tensor in state.items() if name.startswith("classifier"))
    assert head and counts.beside(plain, state) == beside + head
    fresh = base.state(tiny.adapted("bert", "houlsby")[0].model)
    assert counts.beside(plain, fresh) == beside, "the head is as it was"


@pytest.mark.parametrize("name", [name for name in base.names() if not base.find(name).merges])
def test_what_does_not_merge_changes_what_it_trains(name: str) -> None:
    """And where the numbers of a sparse adapter stand is no change."""
    made, _ = tiny.adapted(home(name), name)
    randomised(made.model, seed=5)
    trained = sum(parameter.numel() for parameter in adapter.trained(made.model).values())
    assert counts.beside(tiny.load(home(name)).model, base.state(made.model)) == trained


def test_training_is_counted_by_its_last_stage_and_over_all_of_its_time() -> None:
    stages = [
        {"trained": 100, "peak_bytes": 5, "seconds": 1.0, "tokens": 30, "timed_seconds": 0.0, "timed_tokens": 0},
        {"trained": 7, "peak_bytes": 9, "seconds": 2.0, "tokens": 30, "timed_seconds": 0.0, "timed_tokens": 0},
    ]
    assert counts.training(stages) == {
        "trained_parameters": 7,
        "trained_parameters_at_most": 100,
        "training_peak_bytes": 9,
        "training_tokens_per_second": 20.0,
    }
    timed = {**stages[1], "timed_seconds": 0.5, "timed_tokens": 20}  # what was not watched
    assert counts.training([stages[0], timed])["training_tokens_per_second"] == 40.0
    assert "trained_parameters_at_most" not in counts.training([{**stages[0], "trained": 0}, stages[1]])
