"""What would fit when nothing does: the nearest changes to the question, each found by planning again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from edgepeft import hardware, recipe, traces
from edgepeft.candidate import Candidate, needed_bytes
from edgepeft.errors import UsageError
from edgepeft.plan import PACKED, GiB, Plan, default_precisions
from edgepeft.recipe import PRECISIONS
from edgepeft.surface import ADAMW

SHORTEST = 32  # tokens: shorter sequences are not proposed
SMALLEST = "nf4"
MORE = (2, 4, 8)  # devices
HALVINGS = 4
WIDTHS = {"rank": 0.5, "reduction": 2}  # hyper-parameters that say how much a method trains, and what halves that
TRAINED = ("adapter", "gradients", "optimizer")
STATIC = ("weights", *TRAINED)

Again = Callable[..., Plan]


@dataclass(frozen=True)
class Alternative:
    """A change of the question with which something fits.

    Attributes:
        change: what to ask for instead, by the names of ``planning.plan_model``'s arguments, or another ``hardware``.
        method, precision, optimizer: what fits then; ``least_bytes``: what it takes of a device, one example at a time.
        text: the change as a person types it, with what is chosen then.
    """

    change: Mapping[str, Any]
    method: str
    precision: str
    optimizer: str
    least_bytes: int
    text: str


def find(
    failed: Plan,
    again: Again,
    *,
    tokens: int,
    global_batch: int,
    method: str | None,
    precision: str | None,
) -> tuple[Alternative, ...]:
    """All kinds of changes that help, each alone.

    Args:
        again: plans anew with changed arguments of ``planning.plan_model``.
        tokens, global_batch, method, precision: what was asked for.
    """
    ways = [*_partly(failed, again), *_smaller(failed, again, method, precision), *_narrower(failed, again, method)]
    ways += [*_fewer(again, method, global_batch), *_shorter(failed, again, tokens, method)]
    return (*ways, *_more(failed, again, method), *_larger(failed, again))


def remedy(ways: Sequence[Alternative]) -> str:
    """A sentence for the error."""
    if ways:
        return f"What would: {'; '.join(way.text for way in ways)}."
    return "A smaller model needs less; nothing else that was tried would do."


def _partly(failed: Plan, again: Again) -> Iterator[Alternative]:
    """Training alone, where that is less than merging and exporting."""
    change = {"whole": False}
    found = _planned(again, **change) if failed.hardware.kind == "cpu" else None
    if found is not None:
        chosen = found.chosen()
        text = f"`edgepeft train` alone with {chosen.method} on {_chosen(found)}, merged and exported elsewhere"
        yield _alternative(change, chosen, text)


def _smaller(failed: Plan, again: Again, method: str | None, precision: str | None) -> Iterator[Alternative]:
    """The nearest precision that would do, with the same method, or else the smallest with any."""
    sizes = [*PRECISIONS[: -len(PACKED)], *default_precisions(failed.hardware)[1:]]
    for at in sizes[sizes.index(precision) + 1 :] if precision is not None else ():
        change: dict[str, Any] = {"precision": at}
        found = _planned(again, **change, first=True) if at != "bf16" or failed.hardware.bf16 else None
        if found is not None:
            yield _alternative(change, found.chosen(), f"--method {found.chosen().method} --precision {_chosen(found)}")
            return
    if method is not None:
        found = _planned(again, method=None, precision=None, settings=[], first=True)
        if found is not None:
            change = {"method": found.chosen().method, "precision": found.chosen().precision, "settings": []}
            without = " without --set" if any(each.options for each in failed.candidates) else ""
            text = f"--method {found.chosen().method}{without} --precision {_chosen(found)}"
            yield _alternative(change, found.chosen(), text)


def _narrower(failed: Plan, again: Again, method: str | None) -> Iterator[Alternative]:
    """A smaller rank or width of the method that was asked for, where what it trains is what does not fit."""
    least = failed.least
    rest = sum(size for kind, size in least.bytes.items() if kind not in TRAINED)
    if method is None or needed_bytes(rest, failed.hardware) > failed.hardware.available_bytes:
        return
    from edgepeft.methods import base

    made = base.create(least.method, least.options)
    for name, factor in WIDTHS.items():
        value = next((getattr(made, each.name) for each in fields(made) if each.name == name), 0)
        for _ in range(HALVINGS):
            value = round(value * factor)
            if value < 1:
                break
            setting = f"options.{name}={value}"
            others = [recipe.assignment(f"options.{key}", held) for key, held in least.options.items() if key != name]
            change = {"precision": least.precision, "settings": [*others, setting]}
            found = _planned(again, **change)
            if found is not None:
                yield _alternative(change, found.chosen(), f"--set {setting} with {method} on {_chosen(found)}")
                return


def _fewer(again: Again, method: str | None, global_batch: int) -> Iterator[Alternative]:
    """A smaller global batch, of a method that cannot make one of several microbatches."""
    if method is None or not traces.traits(method).updates_in_backward:
        return
    while (global_batch := global_batch // 2) >= 1:
        change = {"global_batch": global_batch}
        found = _planned(again, **change)
        if found is not None:
            text = f"--global-batch {global_batch} with {found.chosen().method} on {_chosen(found)}"
            yield _alternative(change, found.chosen(), text)
            return


def _shorter(failed: Plan, again: Again, tokens: int, method: str | None) -> Iterator[Alternative]:
    """Shorter sequences, where what does not depend on them leaves room."""
    least = failed.least
    static = sum(size for kind, size in least.bytes.items() if kind in STATIC)
    if needed_bytes(static, failed.hardware) > failed.hardware.available_bytes:
        return
    while (tokens := tokens // 2) >= SHORTEST:
        change = {"tokens": tokens, "method": method or least.method, "precision": least.precision}
        found = _planned(again, **change)
        if found is not None:
            text = f"--seq-len {tokens} with {found.chosen().method} on {_chosen(found)}"
            yield _alternative(change, found.chosen(), text)
            return


def _more(failed: Plan, again: Again, method: str | None) -> Iterator[Alternative]:
    """Several of the same GPU."""
    if failed.devices > 1 or not failed.hardware.several:
        return
    least = failed.least
    for devices in MORE:
        change = {"devices": devices, "method": method or least.method}
        found = _planned(again, **change, first=True)
        if found is not None:
            several = f"{devices} x {failed.hardware.name} (--gpus {devices})"
            strategy = found.chosen().strategy.upper()
            text = f"{several} by {strategy} with {found.chosen().method} on {_chosen(found)}"
            yield _alternative(change, found.chosen(), text)
            return


def _larger(failed: Plan, again: Again) -> Iterator[Alternative]:
    """The smallest machine of the same kind that has enough, or else of another kind, for which it is planned anew."""
    least = failed.least
    devices = sorted(map(hardware.load, hardware.names()), key=lambda device: device.available_bytes)

    def alike(device: hardware.Hardware) -> bool:
        return (device.kind, device.bf16) == (failed.hardware.kind, failed.hardware.bf16)

    devices.sort(key=alike, reverse=True)
    for device in devices:
        if alike(device) and needed_bytes(least.reserved_bytes, device) > device.available_bytes:
            continue
        found = _planned(again, device=device, first=True)
        if found is not None:
            text = f"{found.machine} with {found.chosen().method} on {_chosen(found)}"
            yield _alternative({"hardware": device.name}, found.chosen(), text)
            return


def _planned(again: Again, **changes: Any) -> Plan | None:
    with contextlib.suppress(UsageError):  # such as a global batch that so many devices cannot share
        found = again(**changes)
        return found if found.choice is not None else None
    return None


def _alternative(change: Mapping[str, Any], chosen: Candidate, text: str) -> Alternative:
    return Alternative(change, chosen.method, chosen.precision, chosen.optimizer, chosen.least_bytes, text)


def _chosen(found: Plan) -> str:
    chosen = found.chosen()
    lighter = "" if chosen.optimizer == ADAMW else f" --optimizer {chosen.optimizer}"
    return f"{chosen.precision}{lighter} ({chosen.least_bytes / GiB:.1f} GiB)"
