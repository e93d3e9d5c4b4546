"""A part of training: its optimizer, where it begins, and how many of the run's updates it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.placements import eight_bit
from edgepeft.surface import ADAMW


def no_choice(what: str, kind: str) -> UsageError:
    """The refusal of an optimizer, one of ``surface.OPTIMIZERS``, by what has its own."""
    return UsageError(
        f"{what} cannot be trained with {kind}.",
        "It comes with an optimizer of its own.",
        f"Leave the optimizer out, or use another method: --method full --optimizer {kind}.",
    )


def _as_it_is(model: nn.Module, anatomy: Anatomy) -> None:
    """What most stages do at their beginning."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training with an optimizer and a learning-rate schedule of its own.

    Attributes:
        optimizer: makes the optimizer from model, learning rate and weight decay.
        begin: changes the model, given its anatomy, before the stage's first update: freezes, selects, masks. It runs
            on the model as the stage before left it; when a run is resumed or an adapter loaded, on a fresh one, whose
            tensors are then replaced by the stored ones. So the shapes it makes must not depend on values.
        share: the stage's part of the run's updates, relative to the other stages'.
        updates: a number of updates on top of the run's, instead of a share. A last stage of none changes, once
            training is over, what the adapter holds.
        one_by_one: every update sees a single example, whose loss is summed over its targets.
        measures: its updates take note of gradients, which are not clipped, and change nothing.
    """

    name: str
    optimizer: Callable[[nn.Module, float, float], torch.optim.Optimizer]
    begin: Callable[[nn.Module, Anatomy], None] = _as_it_is
    share: float = 1.0
    updates: int | None = None
    one_by_one: bool = False
    measures: bool = False

    def made(self, model: nn.Module, lr: float, weight_decay: float, kind: str) -> torch.optim.Optimizer:
        """The stage's optimizer; its AdamW as the recipe wants it, one of ``surface.OPTIMIZERS``.

        Raises:
            UsageError: it trains by an optimizer that is no AdamW, and that has one form only.
        """
        found = self.optimizer(model, lr, weight_decay)
        if kind == ADAMW:
            return found
        lighter = eight_bit.like(found, lr)
        if lighter is None and not self.measures:
            raise no_choice(f"The stage {self.name!r} of this method", kind)
        return lighter or found
