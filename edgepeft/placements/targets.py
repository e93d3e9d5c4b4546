"""The linear layers that a method changes, named by their roles."""

from __future__ import annotations

from collections.abc import Sequence

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError, nearest


def linears(method: str, anatomy: Anatomy, roles: Sequence[str]) -> list[str]:
    """Dotted names of the layers with these roles.

    Raises:
        UsageError: there is no such role, or no such layer in the model.
    """
    for role in roles:
        if role not in ROLES:
            raise UsageError(f"{method}: there is no target {role!r}.", "", nearest(role, ROLES))
    names = anatomy.linears(roles)
    if not names:
        raise UsageError(
            f"{method}: its targets match no layer of this model.",
            f"The model has none with the roles {', '.join(roles)}.",
            f"It has {', '.join(sorted({role for block in anatomy.blocks for role in block.linears}))}.",
        )
    return names
