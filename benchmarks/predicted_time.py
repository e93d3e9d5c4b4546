"""Time predicted and measured: the survey's table and steps on this CPU, written to ``results/time.md``.

Usage: ``OMP_NUM_THREADS=1 python tools/probe.py my.toml``, then ``python benchmarks/predicted_time.py my.toml``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import cpu_time
import survey_table
import survey_time
from edgepeft import hardware
from edgepeft.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "time.md"


def report(
    survey: Mapping[str, Mapping[str, survey_time.Row]], steps: Sequence[Mapping[str, Any]], profile: str
) -> str:
    """Markdown."""
    lines = ["# Time: predicted and measured", "", survey_table.section(survey)]
    errors = [row["predicted"] / row["measured"] - 1 for row in steps]
    within = sum(abs(error) <= 0.25 for error in errors)
    device = hardware.load(profile)
    lines += ["## Training steps on this CPU", "", (cpu_time.__doc__ or "").strip().split("\n\n")[1], ""]
    lines.append(
        f"{device.title}, torch {torch.__version__}. The profile is "
        "tools/probe.py's and measures primitives, not steps. Microbatches: "
        + ", ".join(f"{job.model} {job.rows} x {job.tokens}" for job in cpu_time.JOBS)
        + "."
    )
    said = "" if within == len(errors) else " All within 25 %, the target, is NOT met."
    middle = statistics.median(map(abs, errors))
    lines += ["", f"**{within} of {len(errors)} within 25 %, median {middle:.0%}.{said}**", ""]
    lines += ["| model | method | precision | measured s | predicted s | error |", "|---|---|---|---|---|---|"]
    for row, error in zip(steps, errors, strict=True):
        name = f"| {row['model']} | {row['method']} | {row['precision']} "
        lines.append(name + f"| {row['measured']:.2f} | {row['predicted']:.2f} | {error:+.0%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = report(survey_time.compare(), cpu_time.compare(sys.argv[1]), sys.argv[1])
    write_text(RESULTS, text)
    print(text)
