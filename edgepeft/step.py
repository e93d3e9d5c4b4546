"""The training step: forward, loss, backward, update. ``train`` runs it on real tensors, ``trace`` on fake ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.cross_entropy import linear_cross_entropy
from edgepeft.ranks import ALONE, Ranks

Batch = Mapping[str, Tensor]


def unpadded(batch: Batch) -> Batch:
    """A batch without a mask that hides nothing: attention is cheaper so."""
    return {name: value for name, value in batch.items() if name != "attention_mask" or not bool(value.all())}


def targets(batch: Batch) -> Tensor:
    """What the loss counts: labels (batch,) of a classifier, or the answer tokens (answers,)."""
    return batch["labels"] if "labels" in batch else batch["target_ids"]


def inputs(batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that a model's forward takes."""
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    return {name: batch[name] for name in names if name in batch}


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """What the loss is computed from: a classifier's logits (batch, labels), or ``answer_states``."""
    return model(**inputs(batch)).logits if "labels" in batch else answer_states(model, batch)


def loss_of(model: Any, batch: Batch, found: Tensor) -> Tensor:
    """Cross-entropy in nats of ``outputs``, summed over the batch's targets.

    Token logits exist only at target positions, a chunk at a time.
    """
    if "labels" in batch:
        return F.cross_entropy(found.float(), batch["labels"], reduction="sum")
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return linear_cross_entropy(found, head.weight, head.bias, batch["target_ids"], softcap)


def answer_states(model: nn.Module, batch: Batch) -> Tensor:
    """The states (answers, hidden) from which the head predicts the batch's answer tokens."""
    with _without_head(model):
        hidden = model(**inputs(batch), use_cache=False).logits
    return hidden.flatten(0, 1).index_select(0, batch["target_positions"])


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[None]:
    """Let the model return what its head would have read: families scale or normalise that differently before it."""
    head, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    head.forward = lambda hidden: hidden
    if softcap is not None:
        model.config.final_logit_softcapping = None
    try:
        yield
    finally:
        del head.forward
        if softcap is not None:
            model.config.final_logit_softcapping = softcap


def recompute_activations(model: nn.Module) -> None:
    """Let every layer keep its input alone and compute its activations again in backward (arXiv 1604.06174).

    transformers makes the embeddings' output need a gradient then, which only a reentrant checkpoint has use for: a
    method that trains the last layers would send gradients through all.
    """
    made: Any = model
    made.activation_checkpointing_enable()
    made.disable_input_require_grads()


class TrainingStep:
    """One update from one or more microbatches, with the loss averaged over all their targets together.

    Args:
        clip_norm: largest global norm of the gradients, of a parameter group that is ``clipped_apart`` by itself; None
            where gradients are gone by the end of backward.
        backward: runs backward on a loss (accelerate's in training); the loss's own when not given.
        penalty, after_update: those of the method (``methods.base.Method``).
        ranks: who shares each update.
        summed: the gradients are those of the loss summed over all targets.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        backward: Callable[[Tensor], None] | None = None,
        penalty: Callable[[nn.Module, Batch, Tensor], Tensor | None] = lambda model, batch, found: None,
        after_update: Callable[[nn.Module, float], None] = lambda model, progress: None,
        ranks: Ranks = ALONE,
        summed: bool = False,
    ) -> None:
        self.model, self.ranks, self.summed = model, ranks, summed
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.penalty, self.after_update = penalty, after_update
        self.run_backward = backward or (lambda loss: loss.backward())
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward(self, microbatches: Sequence[Batch], lr: float) -> Tensor:
        """Leave the gradients of the mean loss, and of the penalty, in place and return that loss, a scalar.

        Args:
            microbatches: of all ranks, each of which runs its part.
            lr: the learning rate; a parameter group may have a multiple of it, its ``lr_scale``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        count = sum(targets(batch).numel() for batch in microbatches)
        divisor = 1 if self.summed else count
        device = self.trained[0].device
        total = torch.zeros((), device=device)
        mine = self.ranks.mine(microbatches)
        for number, batch in enumerate([*mine, *self.ranks.idle(microbatches)]):
            batch = {name: value.to(device) for name, value in batch.items()}
            found = outputs(self.model, batch)
            loss = loss_of(self.model, batch, found) / divisor
            counts = number < len(mine)
            if counts:
                total += loss.detach() if divisor == count else loss.detach() / count
            extra = self.penalty(self.model, batch, found)
            del found  # backward frees what it has used only if nothing else holds it
            if extra is not None:
                loss = loss + extra * (targets(batch).numel() / count)
            self.run_backward(loss if counts else 0 * loss)
        self.ranks.sum_gradients(self.trained)
        self.ranks.sum([total])
        return total

    def update(self, progress: float = 1.0) -> Tensor | None:
        """Apply the gradients and free them. Returns their norm before clipping.

        Args:
            progress: the share of all updates that are done after this one.
        """
        norm = None
        if self.clip_norm is not None:
            groups = [group["params"] for group in self.optimizer.param_groups if group.get("clipped_apart")]
            apart = {id(parameter) for group in groups for parameter in group}
            norm = nn.utils.clip_grad_norm_([p for p in self.trained if id(p) not in apart], self.clip_norm)
            for group in groups:
                nn.utils.clip_grad_norm_(group, self.clip_norm)
        self.optimizer.step()
        self.after_update(self.model, progress)
        self.optimizer.zero_grad(set_to_none=True)
        return norm
