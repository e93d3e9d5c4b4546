"""Projections of which only some weights exist: the others are zero, and neither trained nor stored."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from edgepeft.placements.projection import Made, Projection
from edgepeft.precision import one_by_one


class Pruned(Made):
    """x Wᵀ + b with W (out, in) zero but for ``values`` at ``places``.

    Attributes:
        values: the weights that exist, (kept,), fp32.
        places: where they are in the flattened W, ascending, (kept,) int32.
    """

    places: Tensor

    def __init__(self, dense: Projection, places: Tensor) -> None:
        super().__init__()
        self.shape = dense.weight.shape
        self.values = nn.Parameter(dense.weight.detach().flatten()[places])
        self.register_buffer("places", places.int())
        self.bias = dense.bias

    def made(self) -> tuple[Tensor, Tensor | None]:
        empty = self.values.new_zeros(self.shape.numel())
        return empty.scatter(0, self.places.long(), self.values).view(self.shape), self.bias


def prune(model: nn.Module, kept: float, score: Callable[[Projection], Tensor]) -> None:
    """Keep the share ``kept`` of the weights of every projection: those with the highest scores.

    The share is that of each, so that how many weights there are does not depend on what they are.

    Args:
        score: how much the weights of a projection matter, (out, in).
    """
    for name, module in one_by_one(model, lambda module: isinstance(module, Projection)):
        count = max(1, round(kept * module.weight.numel()))
        places = score(module).detach().flatten().topk(count).indices.sort().values
        model.set_submodule(name, Pruned(module, places))
