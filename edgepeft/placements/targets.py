"""The linear layers that a method changes, named by their roles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError, nearest


def linears(method: str, anatomy: Anatomy, roles: Sequence[str]) -> list[str]:
    """Dotted names of the layers with these roles.

    Raises:
        UsageError: there is no such role, or no such layer in the model, or it makes what other roles stand for too.
    """
    for role in roles:
        if role not in ROLES:
            raise UsageError(
                f"{method}: there is no target {role!r}.",
                "Targets are roles, the same for every model, not names of modules.",
                nearest(role, ROLES),
            )
    names = anatomy.linears(roles)
    if not names:
        raise UsageError(
            f"{method}: its targets match no layer of this model.",
            f"It has none with the roles {', '.join(roles)}." if roles else "They are an empty list.",
            "Give options.targets some of what it has: "
            f"{', '.join(sorted({role for block in anatomy.blocks for role in block.linears}))}.",
        )
    for name in names:
        if others := sorted(anatomy.roles(name) - set(roles)):
            raise UsageError(
                f"{method}: {name} is {' and '.join(others)} too.",
                "This model makes them with one layer, all of which would be changed.",
                f"Give options.targets {', '.join(role for role in ROLES if role in anatomy.roles(name))}, or none.",
            )
    return names


def check_rank(method: str, rank: int, model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a rank that no change of these layers can have.

    Where only some are that small, as keys and values of few heads are, the larger ones still use it.

    Raises:
        UsageError: see above.
    """
    layers: list[Any] = [model.get_submodule(name) for name in names]
    highest = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > highest:
        raise UsageError(
            f"{method} cannot work with rank = {rank} on this model.",
            f"No change of its layers can be of a rank above {highest}: the rest would be stored for nothing.",
            f"Use --set options.rank={max(1, highest // 8)} or so.",
        )
