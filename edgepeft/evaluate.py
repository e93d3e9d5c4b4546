"""How good a torch model is on held-out examples, by the task's metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from edgepeft.cross_entropy import chunks
from edgepeft.ranks import ALONE, Ranks
from edgepeft.recipe import Recipe
from edgepeft.step import Batch, answer_states, inputs, targets

if TYPE_CHECKING:  # plans, which evaluate too, do not wait for the libraries of data
    from edgepeft.data import Data


def better(task: str, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
    """Whether ``metrics`` beats ``best`` by the task's first metric; classifiers with equal accuracy by their loss."""
    if best is None:
        return True
    if task == "classification" and metrics["accuracy"] != best["accuracy"]:
        return metrics["accuracy"] > best["accuracy"]
    return metrics["loss"] < best["loss"]


def validation_batches(data: Data, recipe: Recipe) -> list[Batch]:
    """The examples every evaluation of a run uses, in microbatches."""
    from edgepeft.data.batches import sample

    size = recipe.microbatch or 1
    order = sample(len(data.validation), recipe.validation_limit, seed=recipe.seed)
    return [data.validation.collate(list(order[first : first + size])) for first in range(0, len(order), size)]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], ranks: Ranks = ALONE) -> dict[str, float]:
    """Mean cross-entropy in nats (``loss``) and the share of right labels (``accuracy``) or of right next answer tokens
    (``token_accuracy``). The model is left in the mode it was in.

    Args:
        batches: of all ranks, each of which runs its part.
    """
    found = torch.stack(totals(model, ranks.mine(batches))).to(ranks.device)
    totals(model, ranks.idle(batches))
    ranks.sum([found])
    count = sum(targets(batch).numel() for batch in batches)
    kind = "accuracy" if "labels" in batches[0] else "token_accuracy"
    return {"loss": float(found[0]) / count, kind: float(found[1]) / count}


@torch.no_grad()
def totals(model: nn.Module, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy and how many targets were right, fp64 scalars on the CPU.

    Their values are not looked at, so that the planner can run this on fake tensors.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        wanted = targets(batch)
        if "labels" in batch:
            parts: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(model(**inputs(batch)).logits, wanted)]
        else:
            states, head = answer_states(model, batch), _head(model)
            sliced = [(states[part], wanted[part]) for part in chunks(len(states), head.weight.shape[0])]
            parts = ((_capped(model, head(hidden)), target) for hidden, target in sliced)
        for logits, target in parts:
            loss += F.cross_entropy(logits.float(), target, reduction="sum").cpu().double()
            right += (logits.argmax(-1) == target).sum().cpu()
    model.train(training)
    return loss, right


@torch.no_grad()
def sample_logits(model: nn.Module, batches: Iterable[Batch], *, bounded: bool = False) -> list[torch.Tensor]:
    """Logits at the batches' targets, one tensor (targets, classes or vocabulary) of fp32 on the CPU a batch.

    Args:
        bounded: at no more targets of a batch than a chunk of the loss has (``cross_entropy.chunks``), the first ones.
    """
    found = []
    device = next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        if "labels" in batch:
            logits = model(**inputs(batch)).logits
        else:
            states, head = answer_states(model, batch), _head(model)
            most = chunks(len(states), head.weight.shape[0])[0] if bounded else slice(None)
            logits = _capped(model, head(states[most]))
        found.append(logits.float().cpu())
    return found


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _capped(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
