"""The survey's training throughput from its own harness, as ``survey_harness.py`` counted and timed it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from edgepeft import roofline
from edgepeft.hardware import Hardware
from edgepeft.roofline import Work

FOUND = Path(__file__).with_name("survey_harness.json")
LAUNCH_SECONDS = 3e-6  # of a kernel; edgepeft/roofline.py, CALL_SECONDS
QUEUE = 1000  # launches that a stream takes before the next one waits (forums.developer.nvidia.com, thread 68937)

Phases = Sequence[Mapping[str, Work]]  # forward, backward, update


class Rates(NamedTuple):
    """Training throughput of a row by two models: the mean over the data sets of source tokens a second."""

    operators: float
    clock: float


def predicted(device: Hardware) -> dict[str, dict[str, Rates]]:
    """Model → row → rates.

    The authors' script divides the source tokens of all microbatches since it last looked by the time of the last
    microbatch and the update, and the table averages over data sets that all see as many examples: so each counts with
    its padded length.
    """
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    each: dict[tuple[str, str], list[Rates]] = {}
    for entry in found["work"]:
        phases = [{kind: Work(*numbers) for kind, numbers in phase.items()} for phase in entry["work"]]
        _, source, _ = entry["setting"]
        rates = Rates(
            source / by_operators(phases, device), source / by_clock(phases, found["host"][entry["row"]], device)
        )
        each.setdefault((entry["model"], entry["row"]), []).append(rates)
    table: dict[str, dict[str, Rates]] = {}
    for (model, row), several in each.items():
        table.setdefault(model, {})[row] = Rates(*(statistics.fmean(rates) for rates in zip(*several, strict=True)))
    return table


def by_operators(phases: Phases, device: Hardware) -> float:
    """Seconds of a microbatch and an update by the roofline alone, as edgepeft plans them."""
    kinds = {kind for phase in phases for kind in phase}
    none = Work(0, 0, 0)
    work = {kind: Work(*map(sum, zip(*(phase.get(kind, none) for phase in phases), strict=True))) for kind in kinds}
    return roofline.seconds(work, device)


def by_clock(phases: Phases, host: Sequence[float], device: Hardware) -> float:
    """Seconds after which the processor has issued a microbatch and an update, which is what the script reads.

    The device is idle when a microbatch begins, for the script copies its tokens there and waits. From then on it runs
    behind the processor, which waits for it only when its queue is full, and not at the end.

    Args:
        phases: forward, backward and update; within each, every launch is as long as the others.
        host: processor seconds of each without launches.
    """
    issued = free = 0.0
    ends: list[float] = []
    for work, seconds in zip(phases, host, strict=True):
        launches = sum(each.calls for kind, each in work.items() if kind != "view")
        running = roofline.seconds(work, replace(device, call_seconds=0.0)) / launches
        for _ in range(launches):
            issued += seconds / launches + LAUNCH_SECONDS
            if len(ends) >= QUEUE:
                issued = max(issued, ends[-QUEUE])
            free = max(free, issued) + running
            ends.append(free)
    return issued
