"""How many updates a run makes, of which batches, at which rates, and to which stage of its method each belongs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgepeft.errors import UsageError
from edgepeft.methods.base import Method
from edgepeft.recipe import Recipe, check_sharded
from edgepeft.stage import Stage


def check(recipe: Recipe, method: Method) -> None:
    """Refuse what cannot be trained, as far as the recipe is decided: precisions, devices, optimizers, batch sizes.

    Raises:
        UsageError: see above.
    """
    method.check_devices(recipe.devices, recipe.strategy)
    check_sharded(recipe.optimizer, recipe.strategy)
    if recipe.precision is not None:
        method.check(recipe.precision)
    if recipe.checkpointing:
        method.check_checkpointing()
    if recipe.optimizer is not None:
        method.check_optimizer(recipe.optimizer)
    if recipe.microbatch is None:
        return
    share = recipe.global_batch // recipe.devices
    if share % recipe.microbatch:
        own = "" if recipe.devices == 1 else f" on each of {recipe.devices} devices"
        raise UsageError(
            f"A global batch of {recipe.global_batch} cannot be made of microbatches of {recipe.microbatch}{own}.",
            "It must be a multiple, so that every update sees as many examples.",
            f"Try --set microbatch={math.gcd(share, recipe.microbatch)}.",
        )
    if method.updates_in_backward and recipe.microbatch != recipe.global_batch:
        raise UsageError(
            f"{method.name} cannot accumulate gradients over microbatches.",
            "It updates each layer inside backward and frees the gradient at once; that is where its saving is.",
            f"Set global_batch to the microbatch, {recipe.microbatch}.",
        )


def steps_per_epoch(examples: int, microbatch: int, global_batch: int) -> int:
    """Updates in one pass over the data; the last one may be smaller."""
    return math.ceil(math.ceil(examples / microbatch) / (global_batch // microbatch))


def total_steps(recipe: Recipe, examples: int) -> int:
    """Updates of the whole run."""
    assert recipe.microbatch is not None
    steps = math.ceil(recipe.epochs * steps_per_epoch(examples, recipe.microbatch, recipe.global_batch))
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


@dataclass(frozen=True)
class Leg:
    """The updates ``first`` to ``last`` (from 1) of a run, which belong to one stage of its method."""

    stage: Stage
    first: int
    last: int


def legs(recipe: Recipe, method: Method, examples: int) -> list[Leg]:
    """The stages of a run's method, in order, each with its updates: a share of the run's, or its own number."""
    stages, found, done = method.stages(), [], 0
    shared, total = sum(stage.share for stage in stages if stage.updates is None), total_steps(recipe, examples)
    used = 0.0
    for stage in stages:
        if stage.updates is not None:
            updates = stage.updates
        else:
            before, used = used, used + stage.share
            updates = max(1, round(total * used / shared) - round(total * before / shared))
        found.append(Leg(stage, done + 1, done := done + updates))
    return found


def learning_rate(recipe: Recipe, highest: float, step: int, total: int) -> float:
    """The rate of update ``step`` (from 1): a linear rise over the warm-up, then a cosine or linear fall to zero."""
    warmup = math.ceil(recipe.warmup * total)
    if step <= warmup:
        return highest * step / warmup
    left = (total - step + 1) / (total - warmup + 1)
    return highest * (0.5 * (1 - math.cos(math.pi * left)) if recipe.schedule == "cosine" else left)
