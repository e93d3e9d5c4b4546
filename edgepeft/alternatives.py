"""What would fit when nothing does: the nearest changes to the question, each found by planning again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from edgepeft import hardware, recipe
from edgepeft.candidate import needed_bytes
from edgepeft.errors import UsageError
from edgepeft.plan import GiB, Plan
from edgepeft.surface import ADAMW

SHORTEST = 32  # tokens: shorter sequences are not proposed
SMALLEST = "nf4"
MORE = (2, 4, 8)  # devices
HALVINGS = 4
WIDTHS = {"rank": 0.5, "reduction": 2}  # hyper-parameters that say how much a method trains, and what halves that
TRAINED = ("adapter", "gradients", "optimizer")
STATIC = ("weights", *TRAINED)

Again = Callable[..., Plan]


def remedy(
    failed: Plan, again: Again, *, tokens: int, method: str | None, precision: str | None, settings: Sequence[str] = ()
) -> str:
    """A sentence for the error, with all kinds of changes that help, each alone.

    Args:
        again: plans anew with changed arguments of ``planning.plan_model``.
        tokens, method, precision, settings: what was asked for.
    """
    ways = [*_smaller(again, method, precision), *_narrower(failed, again, method, settings)]
    ways += _shorter(failed, again, tokens, method)
    ways += [*_more(failed, again, method), *_larger(failed)]
    if ways:
        return f"What would: {'; '.join(ways)}."
    return "A smaller model needs less. No profile has as much memory as this one takes."


def _smaller(again: Again, method: str | None, precision: str | None) -> Iterator[str]:
    """The smallest precision with the same method, or else with any."""
    if method is not None and precision not in (None, SMALLEST):
        found = _planned(again, precision=SMALLEST, first=True)
        if found is not None:
            yield f"--method {method} --precision {_chosen(found)}"
            return
    if method is not None or precision is not None:
        found = _planned(again, method=None, precision=SMALLEST, settings=[], first=True)
        if found is not None:
            yield f"--method {found.chosen().method} --precision {_chosen(found)}"


def _narrower(failed: Plan, again: Again, method: str | None, settings: Sequence[str]) -> Iterator[str]:
    """A smaller rank or width of the method that was asked for, where what it trains is what does not fit."""
    least = failed.least
    rest = sum(size for kind, size in least.bytes.items() if kind not in TRAINED)
    if method is None or needed_bytes(rest, failed.hardware) > failed.hardware.available_bytes:
        return
    from edgepeft.methods import base

    values: dict[str, Any] = {}
    for setting in settings:
        recipe.assign(values, setting)
    made = base.create(least.method, values.get("options"))
    for name, factor in WIDTHS.items():
        value = next((getattr(made, each.name) for each in fields(made) if each.name == name), 0)
        for _ in range(HALVINGS):
            value = round(value * factor)
            if value < 1:
                break
            setting = f"options.{name}={value}"
            found = _planned(again, precision=least.precision, settings=[*settings, setting])
            if found is not None:
                yield f"--set {setting} with {method} on {_chosen(found)}"
                return


def _shorter(failed: Plan, again: Again, tokens: int, method: str | None) -> Iterator[str]:
    """Shorter sequences, where what does not depend on them leaves room."""
    least = failed.least
    static = sum(size for kind, size in least.bytes.items() if kind in STATIC)
    if needed_bytes(static, failed.hardware) > failed.hardware.available_bytes:
        return
    while (tokens := tokens // 2) >= SHORTEST:
        found = _planned(again, tokens=tokens, method=method or least.method, precision=least.precision)
        if found is not None:
            yield f"--seq-len {tokens} with {found.chosen().method} on {_chosen(found)}"
            return


def _more(failed: Plan, again: Again, method: str | None) -> Iterator[str]:
    """Several of the same GPU."""
    if failed.devices > 1 or failed.hardware.kind != "cuda":
        return
    least = failed.least
    for devices in MORE:
        found = _planned(again, devices=devices, method=method or least.method, first=True)
        if found is not None:
            several = f"{devices} x {failed.hardware.name} (--gpus {devices})"
            yield f"{several} with {found.chosen().method} on {_chosen(found)}"
            return


def _larger(failed: Plan) -> Iterator[str]:
    """The smallest machine of the same kind that has enough."""
    least = failed.least
    devices = sorted(map(hardware.load, hardware.names()), key=lambda device: device.available_bytes)
    for device in devices:
        alike = (device.kind, device.bf16) == (failed.hardware.kind, failed.hardware.bf16)
        if alike and needed_bytes(least.reserved_bytes, device) <= device.available_bytes:
            several = f"{failed.devices} x " if failed.devices > 1 else ""
            yield f"{several}{device.name} with {least.method} on {least.precision}"
            return


def _planned(again: Again, **changes: Any) -> Plan | None:
    with contextlib.suppress(UsageError):  # such as a global batch that so many devices cannot share
        found = again(**changes)
        return found if found.choice is not None else None
    return None


def _chosen(found: Plan) -> str:
    chosen = found.chosen()
    lighter = "" if chosen.optimizer == ADAMW else f" --optimizer {chosen.optimizer}"
    return f"{chosen.precision}{lighter} ({chosen.process_bytes / GiB:.1f} GiB)"
