"""LN tuning trains every normalisation's vectors and nothing else of the backbone."""

from __future__ import annotations

import pytest
import tiny
import torch

from edgepeft import adapter, step
from edgepeft.placements import selection

WIDTH, HEAD = 32, 8
# norms of two layers and the others: RMSNorms have a scale, LayerNorms a shift as well
EXPECTED = {
    "llama": (2 * 2 + 1) * WIDTH,
    "qwen2": (2 * 2 + 1) * WIDTH,
    "qwen3": (2 * 2 + 1) * WIDTH + 2 * 2 * HEAD,
    "gemma2": (2 * 4 + 1) * WIDTH,
    "gpt2": (2 * 2 + 1) * WIDTH * 2,
    "bert": (2 * 2 + 1) * WIDTH * 2,
    "distilbert": (2 * 2 + 1) * WIDTH * 2,
    "t5": (2 * 2 + 1 + 2 * 3 + 1) * WIDTH,
    "t5-gated": (2 * 2 + 1 + 2 * 3 + 1) * WIDTH,
}


@pytest.mark.parametrize("at", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts(family: str, at: str) -> None:
    made, _ = tiny.adapted(family, "ln_tuning", at)
    trained = {name: p for name, p in adapter.trained(made.model).items() if name not in made.fresh}
    assert sum(parameter.numel() for parameter in trained.values()) == EXPECTED[family]
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


def test_small_updates_of_half_precision_are_not_lost() -> None:
    """A bf16 scale of 1 would stay 1 under an update of 1e-3."""
    made, method = tiny.adapted("llama", "ln_tuning", "bf16")
    before = {name: p.detach().clone() for name, p in adapter.trained(made.model).items()}
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=None)
    trainer.backward([tiny.batch("llama")], 1e-3)
    trainer.update()
    # Adam's first update is the rate, whatever the gradient
    for name, parameter in adapter.trained(made.model).items():
        moved = (parameter.detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=2e-2, atol=0)


def test_masters_leave_with_their_values() -> None:
    made, method = tiny.adapted("bert", "ln_tuning", "bf16")
    values = {name: p.detach().clone() for name, p in adapter.trained(made.model).items()}
    hidden = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    norm = made.model.get_submodule(made.anatomy.norms[0])
    assert norm(hidden).dtype is torch.bfloat16
    selection.recast(made.model, torch.float32)
    assert norm.weight.dtype is torch.float32
    method.merge(made.model)
    state = dict(made.model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        ("model.norm.parametrizations.weight.original", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_canonical_names(stored: str, plain: str) -> None:
    assert selection.canonical(stored) == plain
