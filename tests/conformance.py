"""What the conformance tests share: a method in a tiny model, stage by stage, trained and compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import tiny
import torch
from torch import nn

from edgepeft import adapter, step
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.methods.base import Method
from edgepeft.stage import Stage

FAMILIES = ("bert", "llama", "t5")  # an encoder, a decoder, an encoder-decoder


@cache
def refusal(name: str, family: str) -> UsageError | None:
    """What a method that cannot work on a family says."""
    try:
        tiny.adapted(family, name)
    except UsageError as error:
        return error
    return None


def needs(name: str, family: str) -> None:
    """Skip the test of a method on a family that it refuses; that it says why is tested on its own."""
    if refused := refusal(name, family):
        pytest.skip(str(refused.fact))


def home(name: str) -> str:
    """The first family that a method works on, from one on that its name alone decides: no other method moves it."""
    first = zlib.crc32(name.encode())
    rotated = [FAMILIES[(first + offset) % len(FAMILIES)] for offset in range(len(FAMILIES))]
    return next(family for family in rotated if refusal(name, family) is None)


def stages(family: str, name: str, at: str = "fp32") -> Iterator[tuple[Backbone, Method, Stage]]:
    """A backbone with a method in it, at the beginning of each of its stages in turn."""
    made, method = tiny.load(family, at), tiny.method(name, **tiny.others(family, name))
    base.apply(method, made)
    for number, stage in enumerate(method.stages()):
        if number:
            base.begin(method, made, number)
        yield made, method, stage


def train(model: nn.Module, method: Method, stage: Stage, batch: step.Batch, updates: int) -> list[float]:
    """The losses of updates of a stage on one batch."""
    rate = 10 * method.learning_rate
    trainer = step.TrainingStep(
        model,
        stage.optimizer(model, rate, 0.0),
        clip_norm=None if method.updates_in_backward else 1.0,
        penalty=method.penalty,
        after_update=method.after_update,
    )
    losses: list[float] = []
    model.train()
    for _ in range(updates):
        losses.append(trainer.backward([batch], rate).item())
        trainer.update(len(losses) / updates)
    model.eval()
    return losses


def randomised(model: nn.Module, seed: int = 0) -> None:
    """Move what a method trains from where it starts, much of which is zero."""
    tiny.randomise(nn.ParameterList(adapter.trained(model).values()), seed)


def gradients(
    model: nn.Module, batch: step.Batch, passes: int = 1, penalty: Callable[..., torch.Tensor | None] | None = None
) -> dict[str, torch.Tensor]:
    """Of everything that gets one, by name; summed over passes, as a method may choose at random what it trains."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    for _ in range(passes):
        found = step.outputs(model, batch)
        extra = None if penalty is None else penalty(model, batch, found)
        loss = step.loss_of(model, batch, found)
        (loss if extra is None else loss + extra).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def structure(model: nn.Module) -> tuple[dict[str, type], dict[str, tuple[int, ...]]]:
    """The classes of a model's modules and the shapes of its parameters, by name."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: type(module) for name, module in model.named_modules()}, shapes
