"""The model that an adapter is for, built without weights, and whether the adapter fits it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from edgepeft import adapter, backbone
from edgepeft.anatomy import ROLES, body
from edgepeft.backbone import Backbone
from edgepeft.methods import base
from edgepeft.methods.base import Method


def of(model: str, task: str, names: dict[str, Tensor]) -> Backbone:
    """The structure of ``model`` for ``task``, with as many labels as the head among an adapter's tensors has."""
    made = _made(model, task, 2)
    head = [name for name, _ in made.model.named_parameters() if name in made.fresh and name.endswith("weight")]
    labels = len(names[head[-1]]) if head and head[-1] in names else 2
    return made if labels == 2 else _made(model, task, labels)


def whole(names: Iterable[str], made: Backbone, norms: bool) -> set[str]:
    """Which of ``names`` are parameters of the plain model: heads, trained as they are.

    Args:
        norms: the method trains those of normalisations; they are not counted.
    """
    plain = {name for name, _ in made.model.named_parameters()}
    return {name for name in names if name in plain and not (norms and module(name) in made.anatomy.norms)}


def loadable(name: str, made: Backbone) -> bool:
    """Whether an adapter may hold this parameter of the plain model: a head's, or one that its checkpoint may lack."""
    parts = body(made.model, made.anatomy)
    return made.task == "classification" and not any(name.startswith(f"{part}.") for part in parts)


def saved_module(name: str, made: Backbone) -> str:
    """The module that PEFT saves for a parameter to be saved: a head as a whole."""
    return next((head for head in made.anatomy.head if name.startswith(f"{head}.")), module(name))


def module(name: str) -> str:
    """The module of a parameter."""
    return name.rpartition(".")[0]


def complete(method: Method, made: Backbone) -> None:
    """Put ``method`` into the structure, as a trained adapter needs it."""
    with torch.device("meta"):
        base.complete(method, made)


def roles(layers: Collection[str], made: Backbone) -> tuple[str, ...]:
    """The roles that any of ``layers`` has."""
    return tuple(role for role in ROLES if set(made.anatomy.linears([role])) & set(layers))


def check(made: Backbone, tensors: dict[str, Tensor], apart: set[str], where: str) -> None:
    """Hold an adapter's tensors against the structure with its method in it.

    Args:
        apart: parameters of the plain model among them.

    Raises:
        UsageError: the adapter does not belong to it.
    """
    parameters = dict(made.model.named_parameters())
    adapter.copy_into(base.state(made.model) | {name: parameters[name] for name in apart}, tensors, where)


def _made(model: str, task: str, labels: int) -> Backbone:
    with torch.device("meta"):
        configuration = backbone.config(backbone.resolve(model))
        return backbone.skeleton(configuration, task=task, at="fp32", labels=labels)
