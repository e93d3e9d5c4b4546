"""edgepeft and its peer (HF peft, transformers' Trainer, bitsandbytes): memory and speed of the same job, in one run.

Usage: ``python benchmarks/run.py [--quick] [--json]``. A full run takes turns between the sides and writes its table to
``benchmarks/results/run.md``; a quick one writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import job
import table
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_text

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results" / "run.md"
ROUNDS, TIMED = 2, 2  # a machine's noise comes and goes in minutes: both sides must meet all of it
SAME_LOSS = 0.02  # nats; bf16 rounding moves this loss by about 0.002, NF4 instead of bf16 by about 0.3

# In the order they run: those that are compared are near each other.
SIDES = {
    "peer-lora-bf16": ("peer.py", "lora", "bf16"),
    "edgepeft-lora-bf16": ("ours.py", "lora", "bf16"),
    "peer-lora-nf4": ("peer.py", "lora", "nf4"),
    "edgepeft-lora-nf4": ("ours.py", "lora", "nf4"),
    "edgepeft-lst-nf4": ("ours.py", "lst", "nf4"),
    "peer-lora-nf4-fp32": ("peer.py", "lora", "nf4-fp32"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one timed step per side; nothing is written")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    for needed, made_by in ((job.MODEL, "tools/models.py smollm2-135m-instruct"), (job.TEXT, "tools/data.py")):
        if not needed.exists():
            raise UsageError(f"There is no {needed.relative_to(job.ROOT)}.", "", f"Run: python {made_by}")
    rounds, timed = (1, 1) if given.quick else (ROUNDS, TIMED)
    machine = table.machine()
    sides = measured(rounds, timed)
    same_job(sides)
    found = {"machine": machine, "rounds": rounds, "timed_steps": timed, "sides": sides}
    found["comparisons"] = table.comparisons(sides)
    if not given.quick:
        write_text(RESULTS, table.markdown(found))
    print(json.dumps(found, indent=2) if given.json else table.markdown(found))


def measured(rounds: int, timed: int) -> dict[str, dict[str, Any]]:
    """Every side timed in ``rounds`` processes of its own, in turn, and traced in one more."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES:
            _say(f"round {number + 1} of {rounds}: {side}")
            runs[side].append(_process(side, job.WARM_UP + timed))
    return {side: _summary(found, _traced(side)) for side, found in runs.items()}


def same_job(sides: dict[str, dict[str, Any]]) -> None:
    """Adapters begin as nothing, so the first loss is the backbone's: equal wherever weights, tokens and targets are.

    Raises:
        EdgePeftError: two sides of one precision differ by more than rounding.
    """
    for precision in ("bf16", "nf4"):
        first = {side: found["losses"][0] for side, found in sides.items() if SIDES[side][2].startswith(precision)}
        reference = next(iter(first.values()))
        if not all(abs(loss - reference) <= SAME_LOSS for loss in first.values()):  # also when one is not a number
            raise EdgePeftError(
                f"The sides do not do the same job: their first losses are {first}.",
                f"Before the first update all {precision} sides compute the same function, to within {SAME_LOSS} nats.",
                "Their numbers must not be compared. Find which side reads other tokens, targets or weights.",
            )


def _traced(side: str) -> dict[str, Any]:
    _say(f"tensor bytes: {side}")
    return _process(side, 2, "--trace")  # the second step has the optimizer's states


def _summary(runs: list[dict[str, Any]], traced: dict[str, Any]) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(value for run in runs for value in run[name][job.WARM_UP :])

    seconds = median("seconds")
    return {
        "peak_tensor_bytes": traced["peak_tensor_bytes"],
        "bytes": traced["bytes"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": median("cpu_seconds"),
        "tokens_per_second": job.MICROBATCH * job.TOKENS / seconds,
        "losses": runs[0]["losses"],
        "trained": runs[0]["trained"],
        "seconds": [run["seconds"] for run in runs],
    }


def _process(side: str, steps: int, *more: str) -> dict[str, Any]:
    script, method, precision = SIDES[side]
    command = [sys.executable, str(FOLDER / script), method, precision, "--steps", str(steps), *more]
    paths = [str(job.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise EdgePeftError(
            f"The side {side} failed with exit code {done.returncode}.",
            "\n".join(done.stderr.strip().splitlines()[-5:]),
            f"See all of it with: {' '.join(command)}",
        )
    return json.loads(done.stdout.splitlines()[-1])


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
