"""What `edgepeft run` takes of a CPU machine: resident memory at its highest, predicted by its plan and measured.

Usage: ``python benchmarks/resident.py [MODEL]``; every case is a run of three updates or more, to the exported device
folder, in a process of its own. Its lines are part C of ``results/plan.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MiB = 2**20
ROOT = Path(__file__).resolve().parent.parent
DATA = {"minilm-l6": "sentiment", "t5-tiny": "sentiment-seq2seq", "smollm2-135m-instruct": "sentiment-prompts"}
METHODS = ("ln_tuning", "houlsby", "prefix_tuning", "ia3", "compacter", "dora", "krona", "adalora", "top_layers")


class Case(NamedTuple):
    model: str
    method: str
    precision: str
    rows: int
    updates: int = 3


def cases() -> Iterator[Case]:
    """Three ways to train on every precision with two microbatches, and other methods on bf16."""
    for model, sizes in (("minilm-l6", (8, 64)), ("smollm2-135m-instruct", (2, 8))):
        for method in ("lora", "lst"):
            for at in ("fp32", "bf16", "int8", "nf4"):
                for rows in sizes:
                    yield Case(model, method, at, rows)
        for rows in sizes:
            yield Case(model, "full", "bf16", rows)
        for method in METHODS:
            yield Case(model, method, "bf16", sizes[1])
        yield Case(model, "lora", "bf16", sizes[0], 40)  # every length of a batch has kernels of its own


def run(case: Case, out: Path) -> None:
    """Plan, train, merge and export, as ``edgepeft run`` does in its process."""
    from edgepeft import pipeline, recipe

    settings = {
        "max_steps": case.updates,
        "microbatch": case.rows,
        "global_batch": case.rows,
        "validation_limit": 4 * case.rows,
    }
    places = {"model": str(ROOT / "models" / case.model), "data": str(ROOT / "data" / DATA[case.model])}
    wanted = recipe.create({**places, "method": case.method, "precision": case.precision, **settings})
    pipeline.run(wanted, out)


def found(case: Case) -> tuple[dict[str, int], int, int]:
    """Bytes of each kind at the predicted peak, of the process as predicted, and as measured."""
    with tempfile.TemporaryDirectory(prefix="edgepeft-resident-") as out:
        command = [sys.executable, __file__, out, *map(str, case)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        plan = json.loads((Path(out) / "plan.json").read_text())
        return plan["bytes"], plan["predicted_process_bytes"], int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        out, model, method, at, rows, updates = sys.argv[1:]
        run(Case(model, method, at, int(rows), int(updates)), Path(out))
        from edgepeft import resident

        print(resident.peak_bytes())
        sys.exit()
    for case in cases():
        if sys.argv[1:] not in ([], [case.model]):
            continue
        try:
            kinds, predicted, measured = found(case)
        except RuntimeError as error:  # a method that is not for the model says so
            print(case, error, file=sys.stderr)
            continue
        shown = " | ".join(f"{size / MiB:.0f}" for size in (sum(kinds.values()), measured, predicted))
        name = f"{case.model} {case.method} {case.precision}, {case.rows} rows, {case.updates} updates"
        print(f"| {name} | {shown} | {predicted / measured - 1:+.1%} |", json.dumps(kinds), flush=True)
