"""Trace the catalogue's models for the plans that most people ask for, so that they are answered without torch.

Usage: ``python tools/traces.py [--models t5-11b ...] [--devices cuda-bf16 ...] [--check N]``. What is in a model's file
is kept, so that it can be stopped and started again; delete the file to trace anew after the code has changed. The
surfaces of one model and kind of device take about a minute of one core; the parameters that several devices share,
which come with them, some seconds. ``--check N`` traces N of the shipped
configurations afresh and fails where one differs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

from edgepeft import catalog, traces, units
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_json
from edgepeft.methods import base
from edgepeft.plan import PACKED, PREFERRED
from edgepeft.surface import Configuration, Surface

FOLDER = Path(__file__).resolve().parent.parent / "edgepeft" / "catalog" / "traces"
# Whether it is a GPU, and whether it multiplies bf16.
DEVICES = {"cuda-bf16": (True, True), "cuda-fp32": (True, False), "cpu-bf16": (False, True), "cpu-fp32": (False, False)}
TOLERANCE = 0.001
BATCH = 50  # configurations between two writes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    own = [name for name in catalog.names() if catalog.traced_as(name) == name]
    parser.add_argument("--models", nargs="*", default=own)
    parser.add_argument("--devices", nargs="*", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--check", type=int, metavar="N", help="trace N shipped configurations afresh")
    chosen = parser.parse_args()
    if chosen.check is not None:
        return check(chosen.check)
    FOLDER.mkdir(exist_ok=True)
    write_json(FOLDER / traces.METHODS, {name: vars(traces.traits_of(base.find(name))) for name in base.names()})
    stored = {name: _read(name) for name in chosen.models}
    for name in chosen.models:
        missing = {
            traces.units_key(each): each
            for device in chosen.devices
            for each in configurations(name, device)
            if traces.units_key(each) not in stored[name]
        }
        for key, configuration in missing.items():
            stored[name][key] = [unit.plain() for unit in units.of(configuration)]
        if missing:
            print(f"{name}: parameters, {_write(name, stored[name]):,} bytes", flush=True)
    wanted = [
        (name, configuration)
        for device in chosen.devices
        for name in chosen.models
        for configuration in configurations(name, device)
        if traces.key(configuration) not in stored[name]
    ]
    for first in range(0, len(wanted), BATCH):
        part = wanted[first : first + BATCH]
        found = traces.find([configuration for _, configuration in part])
        for (name, configuration), surface in zip(part, found, strict=True):
            if isinstance(surface, Surface):
                stored[name][traces.key(configuration)] = surface.plain()
            else:
                print(f"{name}: {surface}", file=sys.stderr)
        for name in dict.fromkeys(name for name, _ in part):
            print(f"{name}: {len(stored[name])} surfaces, {_write(name, stored[name]):,} bytes", flush=True)
    return 0


def configurations(name: str, device: str) -> list[Configuration]:
    """What is traced of one model: the methods that plans show when none is named."""
    cuda, bf16 = DEVICES[device]
    return [
        traces.usual(name, method, at, checkpointing=again, cuda=cuda, bf16=bf16)
        for method in PREFERRED
        for at in ("bf16" if bf16 else "fp32", *PACKED)
        if not (traces.traits(method).writes_backbone and at in PACKED)
        for again in ((False, True) if traces.traits(method).backpropagates else (False,))
    ]


def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def _write(name: str, surfaces: dict[str, Any]) -> int:
    """Returns how many bytes the file has."""
    text = json.dumps(dict(sorted(surfaces.items())), separators=(",", ":"))
    return (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def check(count: int) -> int:
    """Trace some shipped configurations afresh; 1 if one differs."""
    from edgepeft import extrapolate

    shipped = [
        each
        for name in catalog.names()
        for device in DEVICES
        for each in configurations(name, device)
        if traces.shipped(each)
    ]
    failed = 0
    for configuration in random.Random().sample(shipped, min(count, len(shipped))):
        before = traces.shipped(configuration)
        assert before is not None
        try:
            now = extrapolate.surface(configuration)
        except EdgePeftError as error:
            print(f"{traces.key(configuration)}: {error}")
            return 1
        for microbatch in (1, 4, 64):
            a, b = (sum(each.at(microbatch)[1].values()) for each in (before, now))
            if abs(a / b - 1) > TOLERANCE:
                failed = 1
                print(
                    f"{configuration.model['model_type']} {traces.key(configuration)} at {microbatch}: {a} is now {b}"
                )
    print(f"{min(count, len(shipped))} of {len(shipped)} shipped surfaces were traced afresh")
    return failed


if __name__ == "__main__":
    sys.exit(main())
