"""What PyTorch's caching allocator reserves for a model of full depth: a shallow trace's history with layers repeated.

Layers are alike, so what the ones in the middle of a trace allocate and free, forward and backward, as many further
ones do too: two or, where kinds of layers take turns, a whole turn. What lives from one layer to the next is handed on
along the chain of copies.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepeft.allocator import CachingAllocator
from edgepeft.probe import Recording
from edgepeft.surface import PASSING

MICROBATCHES = (1, 4, 16, 64)  # at which it is replayed
Array = np.ndarray[Any, np.dtype[np.int64]]
UPDATES = 2  # the first finds no optimizer states, and puts them where activations were


def overhead(low: Recording, high: Recording, groups: int, traced: int) -> dict[int, float]:
    """Bytes reserved over bytes allocated, at most, in training: microbatch → quotient.

    Args:
        low, high: traces at two depths, of at least two layers to a stack; ``low`` is not looked at for 0 ``groups``.
        groups: how many times as many more layers as ``high`` has above ``low`` are in the whole model above ``high``.
        traced: their microbatch; see ``extrapolate``.
    """
    run = _Run(high, low, groups)
    events = list(run.training())
    fixed, each = run.sizes(events, traced)
    found = {}
    for microbatch in MICROBATCHES:
        allocator = CachingAllocator()
        allocator.run(zip(events, (fixed + microbatch * each).tolist(), strict=True))
        found[microbatch] = allocator.peak_reserved_bytes / max(1, allocator.peak_allocated_bytes)
    return found


@dataclass
class _Group:
    """The middle layers of a stack in one phase, as many as the deeper trace has more, and how copies are chained.

    Attributes:
        forward, backward: their events, from the first to before the second.
        names: for each copy, its own name of everything that is born in the group.
        forward_in, saved_in, backward_in: what dies in the group but is born outside of it → the group's own that a
            further group would find in its place: handed on forward, saved for backward, handed on backward.
    """

    forward: range
    backward: range
    names: list[dict[int, int]]
    forward_in: dict[int, int] = field(default_factory=dict)
    saved_in: dict[int, int] = field(default_factory=dict)
    backward_in: dict[int, int] = field(default_factory=dict)

    def last(self, uid: int) -> int:
        """What a layer behind all copies finds in place of ``uid`` of the group before it."""
        chained = uid in self.forward_in.values() or uid in self.saved_in.values()
        return self.names[-1][uid] if chained else uid


class _Run:
    """The history of training at full depth, of storages that are named by numbers."""

    def __init__(self, high: Recording, low: Recording, groups: int) -> None:
        self.high, self.low, self.groups = high, low, groups
        self.like: dict[int, int] = {}  # a copy, or a later birth of the same → the storage of the trace
        self.copies: dict[int, list[int]] = {}  # what is born and dies with it
        phases = high.tracker.phases.values()
        self.new = itertools.count(1 + max(abs(event) for phase in phases for event in (*phase.held, *phase.events)))

    def sizes(self, events: Sequence[int], traced: int) -> tuple[Array, Array]:
        """Bytes of each event's storage: at any microbatch, and for each example beside."""
        uids = np.abs(np.array(events, dtype=np.int64))
        known = np.zeros((2, int(uids.max(initial=0)) + 1), dtype=np.int64)
        for uid in np.unique(uids).tolist():
            root = uid
            while root in self.like:
                root = self.like[root]
            asked, _, kind = self.high.tracker.storage(root)
            grows = kind in PASSING and traced > 1 and asked % traced == 0
            known[:, uid] = (0, asked // traced) if grows else (asked, 0)
        return known[0, uids], known[1, uids]

    def training(self) -> Iterator[int]:
        """Births (uid) and deaths (-uid) of every stage's first updates, and of an evaluation."""
        phases = self.high.tracker.phases
        alive: set[int] = set()
        for step in [name for name in phases if name.endswith("forward+backward")]:
            update = step.removesuffix("forward+backward") + "update"
            held, (passed, updated) = self._held(step), (self._events(step), self._events(update))
            states = [uid for uid in held if self._kind(uid) == "optimizer"]
            for number in range(UPDATES):
                alive = yield from self._become(alive, [uid for uid in held if number or uid not in states])
                alive = yield from self._go(passed, alive)
                alive = yield from self._become(alive, [*alive, *states])
                alive = yield from self._go(updated, alive)
        alive = yield from self._become(alive, self._held("evaluation"))
        yield from self._go(self._events("evaluation"), alive)

    def _kind(self, uid: int) -> str:
        while uid in self.like:
            uid = self.like[uid]
        return self.high.tracker.storage(uid)[2]

    def _become(self, alive: set[int], held: Sequence[int]) -> Generator[int, None, set[int]]:
        yield from (-uid for uid in sorted(alive.difference(held)))
        yield from (uid for uid in dict.fromkeys(held) if uid not in alive)
        return set(held)

    def _go(self, events: Sequence[int], alive: set[int]) -> Generator[int, None, set[int]]:
        """The events, of which those are left out that a repeated phase cannot have: nothing is born or dies twice."""
        alive = set(alive)
        for event in events:
            if event > 0 and event not in alive:
                alive.add(event)
                yield event
            elif event < 0 and -event in alive:
                alive.discard(-event)
                yield event
        return alive

    def _held(self, phase: str) -> list[int]:
        """What a phase begins with: of the model's static parts, as many more as there are more layers."""
        found = []
        held = self.high.tracker.phases[phase].held
        more = self._more(held, self.low.tracker.phases[phase].held)
        for uid in held:
            found += [uid, *self._copied(uid, more)]
        return found

    def _events(self, phase: str) -> list[int]:
        events = self.high.tracker.phases[phase].events
        if not self.groups:
            return events
        groups = self._groups(phase)
        if groups:
            return list(self._repeated(events, groups))
        born = [event for event in events if event > 0]
        more = self._more(born, [event for event in self.low.tracker.phases[phase].events if event > 0])
        found = []
        for event in events:
            others = self._copied(event, more) if event > 0 else self.copies.get(-event, [])
            found += [event, *(other if event > 0 else -other for other in others)]
        return found

    def _more(self, high: Sequence[int], low: Sequence[int]) -> Counter[tuple[int, str]]:
        """Of which sizes and kinds the deeper trace has more, and how many; those that have copies already left out."""
        found = Counter(_sort(self.high, uid) for uid in high) - Counter(_sort(self.low, uid) for uid in low)
        return found - Counter(_sort(self.high, uid) for uid in high if uid in self.copies)

    def _copied(self, uid: int, more: Counter[tuple[int, str]]) -> list[int]:
        """As many copies as there are more layers, of a storage of which ``high`` has one more."""
        sort = _sort(self.high, uid)
        if uid not in self.copies and more[sort] > 0 and self.groups:
            more[sort] -= 1
            self.copies[uid] = [self._copy(uid) for _ in range(self.groups)]
        return self.copies.get(uid, [])

    def _copy(self, uid: int) -> int:
        made = next(self.new)
        self.like[made] = uid
        return made

    def _groups(self, phase: str) -> list[_Group]:
        """The group of each stack, where the marks of its layers are all there."""
        events = self.high.tracker.phases[phase].events
        marks: dict[tuple[str, int, int], int] = {}
        for label, moment in self.high.marks.get(phase, []):
            marks.setdefault(label, moment)
        layers = Counter(stack for what, stack, _ in marks if what == "forward")
        shallow = {label for label, _ in self.low.marks.get(phase, [])}
        layers -= Counter(stack for what, stack, _ in shallow if what == "forward")
        found = []
        for stack in sorted({stack for _, stack, _ in marks}):
            more = layers[stack]
            ends = [marks.get(("forward", stack, 1)), marks.get(("forward", stack, 1 + more))]
            back = [marks.get(("backward", stack, more)), marks.get(("backward", stack, 0))]
            if None in ends:
                continue
            forward = range(ends[0] or 0, ends[1] or 0)
            backward = range(back[0] or 0, back[1] or 0) if None not in back else range(len(events), len(events))
            inside = [event for part in (forward, backward) for event in events[part.start : part.stop] if event > 0]
            names = [{uid: self._copy(uid) for uid in inside} for _ in range(self.groups)]
            found.append(self._chained(events, _Group(forward, backward, names)))
        return found

    def _chained(self, events: Sequence[int], group: _Group) -> _Group:
        """Find what layers hand on: what dies in the group but was born before it is, one group on, the group's own."""
        born = {event: index for index, event in enumerate(events) if event > 0}
        died = {-event: index for index, event in enumerate(events) if event < 0}

        def where(index: int | None) -> str:
            if index is None:
                return ""
            if index in group.forward:
                return "forward"
            if index in group.backward:
                return "backward"
            middle = group.forward.stop <= index < group.backward.start
            return "middle" if middle else "before" if index < group.forward.start else "after"

        journeys: dict[tuple[str, str], list[int]] = {}
        for uid in sorted(died, key=died.__getitem__):
            if uid in born:
                journeys.setdefault((where(born[uid]), where(died[uid])), []).append(uid)
        group.forward_in = self._chain(journeys, ("before", "forward"), ("forward", "middle"))
        taken = set(group.forward_in.values())
        group.saved_in = self._chain(journeys, ("before", "backward"), ("forward", "middle"), taken)
        group.backward_in = self._chain(journeys, ("middle", "backward"), ("backward", "after"))
        handed = {*taken, *group.saved_in.values(), *group.backward_in.values()}
        for uid in group.names[0]:
            if uid not in handed and where(died.get(uid)) not in ("forward", "backward"):
                self.copies[uid] = [names[uid] for names in group.names]
        return group

    def _chain(
        self,
        journeys: dict[tuple[str, str], list[int]],
        arriving: tuple[str, str],
        leaving: tuple[str, str],
        taken: Set[int] = frozenset(),
    ) -> dict[int, int]:
        """What arrives in the group → what of the same size leaves it, in the order in which they die."""
        left = [uid for uid in journeys.get(leaving, []) if uid not in taken]
        found = {}
        for uid in journeys.get(arriving, []):
            size = self.high.tracker.storage(uid)[0]
            match = next((other for other in left if self.high.tracker.storage(other)[0] == size), None)
            if match is not None:
                left.remove(match)
                found[uid] = match
        return found

    def _repeated(self, events: Sequence[int], groups: Sequence[_Group]) -> Iterator[int]:
        for index in range(len(events) + 1):
            for group in groups:
                if index == group.forward.stop:
                    for number in range(self.groups):
                        yield from self._forward(events, group, number)
                if index == group.backward.start:
                    for number in reversed(range(self.groups)):
                        yield from self._backward(events, group, number)
            if index < len(events):
                yield from self._outside(events[index], index, groups)

    def _outside(self, event: int, index: int, groups: Sequence[_Group]) -> Iterator[int]:
        """An event of the trace itself."""
        if event > 0:
            yield event
            return
        uid = -event
        for group in groups:
            if index in group.backward:  # behind the backward passes of all copies
                if uid in group.backward_in:
                    uid = group.names[0][group.backward_in[uid]]
            elif index >= group.forward.stop and index < group.backward.start and uid in group.names[0]:
                uid = group.last(uid)
        yield -uid
        yield from (-other for other in self.copies.get(uid, []))

    def _forward(self, events: Sequence[int], group: _Group, number: int) -> Iterator[int]:
        before = group.names[number - 1] if number else {}
        for event in events[group.forward.start : group.forward.stop]:
            uid = abs(event)
            if uid in group.names[number]:
                yield group.names[number][uid] if event > 0 else -group.names[number][uid]
            elif uid in group.forward_in:
                yield -before.get(group.forward_in[uid], group.forward_in[uid])

    def _backward(self, events: Sequence[int], group: _Group, number: int) -> Iterator[int]:
        before = group.names[number - 1] if number else {}
        for event in events[group.backward.start : group.backward.stop]:
            uid = abs(event)
            if uid in group.names[number]:
                yield group.names[number][uid] if event > 0 else -group.names[number][uid]
            elif uid in group.saved_in:
                yield -before.get(group.saved_in[uid], group.saved_in[uid])
            elif uid in group.backward_in:
                later = group.names[number + 1] if number + 1 < self.groups else None
                yield -later[group.backward_in[uid]] if later is not None else -uid


def _sort(recording: Recording, uid: int) -> tuple[int, str]:
    """Bytes and kind of a storage."""
    asked, _, kind = recording.tracker.storage(uid)
    return asked, kind
