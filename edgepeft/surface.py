"""Peak memory as a function of the microbatch, and the configuration it belongs to. Plain data: no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgepeft.roofline import Work, along

KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "temporaries")
PASSING = KINDS[-2:]  # the kinds that may grow with the microbatch
LOADING = "loading"
TRAINING = (LOADING, "forward+backward", "update", "evaluation", "checkpoint")
"""Phases of training; with several stages, each has its own of some. Merging and exporting come after it."""

AFTERWARDS = ("merge", "reloading", "exporting")
"""On a CPU, phases of merging (of the trained model, and of its backbone beside what was made of it) and of export."""

WORKING = ("forward+backward", "update")
"""Phases whose work is counted: a step is the first for each of its microbatches, and then the second."""

ADAMW, EIGHT_BIT = OPTIMIZERS = ("adamw", "adamw-8bit")
"""AdamW with states in fp32 (of bf16 weights in bf16), and with states in 8 bits (``placements.eight_bit``)."""

CHUNK = 2**22
"""Numbers that an optimizer works on at a time where it makes fp32 copies, which are small beside the model so."""


DDP, FSDP = STRATEGIES = ("ddp", "fsdp")
"""How several devices share the work: each holds all of the model, or a part (``shards``)."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Everything that decides how much memory a training step takes.

    Attributes:
        model: the Hugging Face configuration as a dictionary, with its ``model_type``.
        tokens: length of the (source) sequences; ``target_tokens``: of the targets of seq2seq.
        accumulates: whether an update takes several microbatches.
        cuda: allocate as a CUDA device does.
        bf16: whether the hardware multiplies bf16.
        optimizer: one of ``OPTIMIZERS``; a method with an optimizer of its own has only the first.
    """

    model: Mapping[str, Any]
    task: str
    method: str
    options: Mapping[str, Any]
    precision: str
    checkpointing: bool
    microbatch: int
    tokens: int
    target_tokens: int
    labels: int
    accumulates: bool
    cuda: bool
    bf16: bool
    optimizer: str = ADAMW


@dataclass(frozen=True)
class Moment:
    """Bytes held at one moment, by kind in the order of ``KINDS``: ``fixed`` plus ``each`` per example.

    ``less`` bytes of temporaries are not needed by a microbatch of 1; see ``Surface.saturated``.
    """

    fixed: tuple[float, ...]
    each: tuple[float, ...]
    less: float = 0.0

    def bytes(self, microbatch: int, saturated: int) -> dict[str, int]:
        """What each kind holds."""
        sizes = [a + b * microbatch for a, b in zip(self.fixed, self.each, strict=True)]
        if microbatch < saturated:
            sizes[-1] -= self.less * (saturated - microbatch) / (saturated - 1)
        return {kind: max(0, round(size)) for kind, size in zip(KINDS, sizes, strict=True)}


@dataclass(frozen=True)
class Surface:
    """What a configuration needs at any microbatch.

    Each moment of a step is affine in the microbatch; a phase's peak is the largest of its moments.

    Attributes:
        phases: phase → the moments that can be its peak.
        saturated: the microbatch from which a loss computed in chunks fills a chunk; below, it needs less.
        work: what forward+backward of a microbatch and update do, by class of operator, at microbatch 0 and at
            microbatch 1; of a method with several stages, in the last.
        sent: phase of ``work`` → bytes that one of several devices sends in it, and receives; see ``sharding``.
        overhead: what CUDA's caching allocator reserves over what is allocated: microbatch → quotient. Empty on a CPU.
    """

    phases: Mapping[str, Sequence[Moment]]
    saturated: int = 1
    work: Mapping[str, tuple[Mapping[str, Work], Mapping[str, Work]]] = field(default_factory=dict)
    overhead: Mapping[int, float] = field(default_factory=dict)
    sent: Mapping[str, float] = field(default_factory=dict)

    def peaks(self, microbatch: int) -> dict[str, dict[str, int]]:
        """Phase → bytes by kind at its peak."""
        return {
            phase: max((moment.bytes(microbatch, self.saturated) for moment in moments), key=lambda b: sum(b.values()))
            for phase, moments in self.phases.items()
        }

    def at(self, microbatch: int, only: Sequence[str] | None = None) -> tuple[str, dict[str, int]]:
        """The phase that needs most, of those wanted, and what it holds at its peak.

        Args:
            only: the names of phases, without the stage some are preceded by; all phases when not given.
        """
        found = self.peaks(microbatch)
        names = [name for name in found if only is None or name.rpartition(": ")[2] in only]
        phase = max(names, key=lambda name: sum(found[name].values()))
        return phase, found[phase]

    def reserved_bytes(self, microbatch: int, only: Sequence[str] | None = None) -> int:
        """What the allocator holds at the peak of ``at``; between microbatches of ``overhead`` the larger counts."""
        below = max((size for size in self.overhead if size <= microbatch), default=microbatch)
        above = min((size for size in self.overhead if size >= microbatch), default=below)
        quotient = max(self.overhead.get(below, 1.0), self.overhead.get(above, 1.0))
        return round(sum(self.at(microbatch, only)[1].values()) * quotient)

    def work_at(self, microbatch: int) -> dict[str, dict[str, Work]]:
        """Phase → class of operator → what it does for one microbatch of this size."""
        return {phase: along(none, one, microbatch) for phase, (none, one) in self.work.items()}

    def with_temporaries(self, more: int) -> Surface:
        """The same where temporaries are so many bytes more, from the first step on: loading computes nothing."""

        def grown(moment: Moment) -> Moment:
            return replace(moment, fixed=(*moment.fixed[:-1], moment.fixed[-1] + more))

        phases = {
            phase: moments if phase == LOADING else tuple(map(grown, moments)) for phase, moments in self.phases.items()
        }
        return replace(self, phases=phases)

    def plain(self) -> dict[str, Any]:
        """As JSON, for files: see ``read``."""
        moments = {
            phase: [[*map(_short, moment.fixed), *map(_short, moment.each), _short(moment.less)] for moment in moments]
            for phase, moments in self.phases.items()
        }
        work = {
            phase: {kind: [*none.get(kind, (0, 0, 0)), *one[kind]] for kind in one}
            for phase, (none, one) in self.work.items()
        }
        overhead = {str(size): round(quotient, 4) for size, quotient in self.overhead.items()}
        return {"saturated": self.saturated, "phases": moments, "work": work, "overhead": overhead}


def read(plain: Mapping[str, Any]) -> Surface:
    """The opposite of ``Surface.plain``."""
    width = len(KINDS)
    phases = {
        phase: tuple(Moment(tuple(row[:width]), tuple(row[width : 2 * width]), row[2 * width]) for row in rows)
        for phase, rows in plain["phases"].items()
    }
    work = {
        phase: (
            {kind: Work(*row[:3]) for kind, row in rows.items()},
            {kind: Work(*row[3:]) for kind, row in rows.items()},
        )
        for phase, rows in plain.get("work", {}).items()  # files made before it was counted have none
    }
    overhead = {int(size): quotient for size, quotient in plain.get("overhead", {}).items()}
    return Surface(phases, plain["saturated"], work, overhead)


def _short(value: float) -> float:
    """A whole number of bytes where that is exact enough: files stay small."""
    return round(value) if abs(value) >= 1 else 0
