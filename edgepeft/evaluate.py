"""How good a torch model is on held-out examples, by the task's metric."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from edgepeft.cross_entropy import chunks
from edgepeft.step import Batch, answer_states, inputs, targets

PRIMARY = {"classification": "accuracy", "causal-lm": "loss", "seq2seq": "loss"}


def better(task: str, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether ``metrics`` beats ``best`` by the task's first metric; classifiers with equal accuracy by their loss."""
    if best is None:
        return True
    if task == "classification" and metrics["accuracy"] != best["accuracy"]:
        return metrics["accuracy"] > best["accuracy"]
    return metrics["loss"] < best["loss"]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy in nats (``loss``) and the share of right labels (``accuracy``) or of right next answer tokens
    (``token_accuracy``). The model is left in the mode it was in.
    """
    loss, right, count, kind = totals(model, batches)
    return {"loss": float(loss) / count, kind: float(right) / count}


@torch.no_grad()
def totals(model: nn.Module, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor, int, str]:
    """The summed cross-entropy, how many targets were right, of how many, and the name of their share.

    The values of the first two are not looked at, so that the planner can run this on fake tensors.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    count, kind = 0, "accuracy"
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        wanted = targets(batch)
        count += wanted.numel()
        if "labels" in batch:
            parts = [(model(**inputs(batch)).logits, wanted)]
        else:
            kind = "token_accuracy"
            states, head = answer_states(model, batch), model.get_output_embeddings()  # type: ignore[operator]
            sliced = ((states[part], wanted[part]) for part in chunks(len(states), head.weight.shape[0]))
            parts = ((_capped(model, head(hidden)), target) for hidden, target in sliced)  # type: ignore[assignment]
        for logits, target in parts:
            loss += F.cross_entropy(logits.float(), target, reduction="sum").cpu().double()
            right += (logits.argmax(-1) == target).sum().cpu()
    model.train(training)
    return loss, right, count, kind


@torch.no_grad()
def sample_logits(model: nn.Module, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Logits at the batches' targets, one tensor (targets, classes or vocabulary) of fp32 on the CPU a batch."""
    found = []
    device = next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        logits = model(**inputs(batch)).logits
        if "target_positions" in batch:
            logits = logits.flatten(0, 1)[batch["target_positions"]]
        found.append(logits.float().cpu())
    return found


def _capped(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
