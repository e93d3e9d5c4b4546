"""A trained change of few entries, chosen among all of many tensors: one list of values, one of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.errors import EdgePeftError
from edgepeft.placements import change
from edgepeft.placements.change import Change, Place
from edgepeft.precision import is_shape_only

CHILD = "sparse"


class Sparse(nn.Module):
    """The entries that change, in the tensors that could, laid end to end.

    Which tensor an entry is in depends on values and not on shapes, so all are kept together.

    Attributes:
        values: what is added to each entry, (entries,), fp32.
        positions: where each is, ascending, (entries,).
    """

    values: nn.Parameter
    positions: Tensor

    def __init__(self, positions: Tensor, sizes: Sequence[int]) -> None:
        super().__init__()
        self.ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        narrow = torch.int32 if self.ends[-1] < 2**31 else torch.int64
        self.register_buffer("positions", positions.to(narrow))
        self.values = nn.Parameter(torch.zeros(len(positions), device=positions.device))
        self._spans: tuple[int, list[int]] | None = None  # a version of the positions, and where they go from to tensor

    def span(self, number: int) -> slice:
        """The entries that are in a tensor."""
        if self._spans is None or self._spans[0] != self.positions._version:
            self._spans = self.positions._version, self._find_spans()
        ends = self._spans[1]
        return slice(ends[number - 1] if number else 0, ends[number])

    def local(self, number: int) -> Tensor:
        """The positions of those entries in their tensor, flattened."""
        return self.positions[self.span(number)] - (self.ends[number - 1] if number else 0)

    def _find_spans(self) -> list[int]:
        count, total = len(self.positions), self.ends[-1]
        if is_shape_only(self.positions):  # when planning: as if they were spread evenly
            return [count * end // total for end in self.ends]
        ascending = bool((self.positions[1:] > self.positions[:-1]).all())
        if not ascending or int(self.positions[0]) < 0 or int(self.positions[-1]) >= total:
            raise EdgePeftError(
                "The positions of a sparse change are not those of entries of this model.",
                f"They must ascend from 0 to at most {total - 1}; the adapter's file is damaged or of another model.",
                "Load the adapter onto the backbone it was trained on, or train again.",
            )
        ends = torch.tensor(self.ends, dtype=self.positions.dtype, device=self.positions.device)
        found: list[int] = torch.searchsorted(self.positions, ends).tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spans": None}  # a copy's tensors count their versions from 0


class _Entries(Change):
    """The part of a sparse change that is in one tensor."""

    def __init__(self, sparse: Sparse, number: int) -> None:
        super().__init__()
        self._sparse = (sparse,)  # in a tuple: a module of the model's, not of each tensor's
        self.number = number

    def trained(self) -> tuple[Tensor, ...]:
        return (self._sparse[0].values[self._sparse[0].span(self.number)],)

    def made(self, frozen: Tensor, *trained: Tensor) -> Tensor:
        where = self._sparse[0].local(self.number)
        return frozen.flatten().index_add(0, where, trained[0].to(frozen.dtype)).view_as(frozen)


def keep(
    model: nn.Module,
    places: Sequence[Place],
    density: float,
    score: Callable[[Place], Tensor],
    start: Callable[[Place], Tensor] | None = None,
) -> None:
    """Train the share ``density`` of all entries of ``places``: those with the highest scores, and freeze the rest.

    Args:
        score: how much the entries of a place matter, of its tensor's shape.
        start: what is added to them at first, of its tensor's shape; nothing if not given.
    """
    sizes = [place.tensor.numel() for place in places]
    with torch.no_grad():
        sparse = Sparse(highest((score(place) for place in places), max(1, round(density * sum(sizes)))), sizes)
        if start is not None:
            for number, place in enumerate(places):
                sparse.values[sparse.span(number)] = start(place).flatten()[sparse.local(number)]
    for number, place in enumerate(places):
        change.put(place, _Entries(sparse, number))
    model.add_module(CHILD, sparse)


def highest(scores: Iterable[Tensor], count: int) -> Tensor:
    """The positions of the ``count`` highest scores, ascending, counted through all tensors in turn.

    The tensors are looked at one by one: nothing as large as all of them together is made.
    """
    best: Tensor | None = None
    positions: Tensor | None = None
    passed = 0
    for tensor in scores:
        flat = tensor.flatten().float()
        here = torch.arange(passed, passed + len(flat), device=flat.device)
        passed += len(flat)
        if best is not None and positions is not None:
            flat, here = torch.cat([best, flat]), torch.cat([positions, here])
        best, order = flat.topk(min(count, len(flat)), sorted=False)
        positions = here[order]
    assert positions is not None
    return positions.sort().values


def fold(model: nn.Module) -> None:
    """Add the entries to their tensors, and leave plain modules."""
    change.fold(model)
    delattr(model, CHILD)
