"""Metrics are those of all logits at once, on any cut of the data."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

from edgepeft import cross_entropy, step
from edgepeft.evaluate import better, evaluate, sample_logits


@pytest.mark.parametrize("at", ["fp32", "nf4"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_accuracy(family: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 1)  # so that there is more than one chunk
    made = tiny.load(family, at)
    batches = [tiny.batch(family, rows=rows, seed=rows, lengths=(6, 20)) for rows in (1, 4)]
    logits, targets = [], []
    for batch in batches:
        found = made.model(**step.inputs(batch)).logits.float()
        if "target_positions" in batch:
            found = found.flatten(0, 1)[batch["target_positions"]]
        logits.append(found)
        targets.append(step.targets(batch))
    together, wanted = torch.cat(logits), torch.cat(targets)
    metrics = evaluate(made.model, batches)
    kind = "accuracy" if made.task == "classification" else "token_accuracy"
    assert metrics.keys() == {"loss", kind}
    loss = F.cross_entropy(together, wanted).item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4 if at == "fp32" else 2e-2)
    assert metrics[kind] == pytest.approx((together.argmax(-1) == wanted).float().mean().item(), abs=1e-6)
    for ours, theirs in zip(sample_logits(made.model, batches), logits, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_trains_goes_on_training() -> None:
    made = tiny.load("bert")
    made.model.train()
    modes = []
    handle = made.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    evaluate(made.model, [tiny.batch("bert")])
    handle.remove()
    assert modes == [False] and made.model.training


def test_the_head_is_where_all_logits_would_be() -> None:
    """Even in evaluation, logits exist a chunk at a time."""
    made, largest = tiny.load("llama"), [0]
    made.model.lm_head.register_forward_hook(lambda m, i, o: largest.append(o.numel()))
    evaluate(made.model, [tiny.batch("llama", rows=8, lengths=(40, 40))])
    count = step.targets(tiny.batch("llama", rows=8, lengths=(40, 40))).numel()
    assert max(largest) <= count * tiny.VOCABULARY < 8 * 40 * tiny.VOCABULARY


@pytest.mark.parametrize(
    ("task", "new", "old", "expected"),
    [
        ("classification", {"accuracy": 0.5, "loss": 9.0}, None, True),
        ("classification", {"accuracy": 0.6, "loss": 9.0}, {"accuracy": 0.5, "loss": 1.0}, True),
        ("classification", {"accuracy": 0.4, "loss": 0.1}, {"accuracy": 0.5, "loss": 1.0}, False),
        ("classification", {"accuracy": 0.5, "loss": 0.9}, {"accuracy": 0.5, "loss": 1.0}, True),
        ("classification", {"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 1.0}, False),
        ("causal-lm", {"token_accuracy": 0.1, "loss": 0.9}, {"token_accuracy": 0.5, "loss": 1.0}, True),
        ("seq2seq", {"token_accuracy": 0.9, "loss": 1.1}, {"token_accuracy": 0.5, "loss": 1.0}, False),
    ],
)
def test_better(task: str, new: dict[str, float], old: dict[str, float] | None, expected: bool) -> None:
    assert better(task, new, old) is expected
