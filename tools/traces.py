"""Trace the catalogue's models for the plans that most people ask for, so that they are answered without torch.

Usage: ``python tools/traces.py [--models t5-11b ...] [--devices cuda-bf16 ...] [--check N]``. What is in a model's file
is kept, so that it can be stopped and started again; delete the file to trace anew after the code has changed. All
models take hours. ``--check N`` traces N of the shipped configurations afresh and fails where one differs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

from edgepeft import catalog, traces
from edgepeft.catalog.fields import depth
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_json
from edgepeft.methods import base
from edgepeft.plan import PACKED, PREFERRED
from edgepeft.surface import Configuration, Surface

FOLDER = Path(__file__).resolve().parent.parent / "edgepeft" / "catalog" / "traces"
DEVICES = {"cuda-bf16": (True, True), "cuda-fp32": (True, False), "cpu-fp32": (False, False)}  # cuda, native bf16
TOLERANCE = 0.001
BATCH = 24  # configurations between two writes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=catalog.names())
    parser.add_argument("--devices", nargs="*", default=list(DEVICES), choices=list(DEVICES))
    parser.add_argument("--check", type=int, metavar="N", help="trace N shipped configurations afresh")
    chosen = parser.parse_args()
    if chosen.check is not None:
        return check(chosen.check)
    FOLDER.mkdir(exist_ok=True)
    write_json(FOLDER / traces.METHODS, {name: vars(traces.traits_of(base.find(name))) for name in base.names()})
    for name in sorted(chosen.models, key=lambda model: depth(traces.fields(model))):
        path = FOLDER / f"{name}.json.gz"
        stored = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}
        wanted = [each for each in configurations(name, chosen.devices) if traces.key(each) not in stored]
        for first in range(0, len(wanted), BATCH):
            part = wanted[first : first + BATCH]
            for configuration, found in zip(part, traces.find(part), strict=True):
                if isinstance(found, Surface):
                    stored[traces.key(configuration)] = found.plain()
                else:
                    print(f"{name}: {found}", file=sys.stderr)
            text = json.dumps(dict(sorted(stored.items())), separators=(",", ":"))
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{name}: {len(stored)} surfaces, {path.stat().st_size if path.exists() else 0:,} bytes", flush=True)
    return 0


def configurations(name: str, devices: list[str]) -> list[Configuration]:
    """What is traced of one model: the methods that plans show when none is named."""
    known = catalog.entry(name)
    assert known is not None
    model = traces.fields(name)
    found = []
    for device in devices:
        cuda, bf16 = DEVICES[device]
        for method in PREFERRED:
            of_method = traces.traits_of(base.find(method))
            for at in ("bf16" if bf16 else "fp32", *PACKED):
                if of_method.writes_backbone and at in PACKED:
                    continue
                for again in (False, True) if of_method.backpropagates else (False,):
                    found.append(
                        Configuration(
                            model=model,
                            task=known["_edgepeft"]["task"],
                            method=method,
                            options={},
                            precision=at,
                            checkpointing=again,
                            microbatch=1,
                            tokens=traces.usual_tokens(model),
                            target_tokens=traces.TARGET_TOKENS,
                            labels=traces.LABELS,
                            accumulates=True,
                            cuda=cuda,
                            bf16=bf16,
                        )
                    )
    return found


def check(count: int) -> int:
    """Trace some shipped configurations afresh; 1 if one differs."""
    from edgepeft import extrapolate

    shipped = [each for name in catalog.names() for each in configurations(name, list(DEVICES)) if traces.shipped(each)]
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
