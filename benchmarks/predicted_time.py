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
import survey_time
from edgepeft import hardware
from edgepeft.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "time.md"


def report(
    survey: Mapping[str, Mapping[str, Sequence[float]]], steps: Sequence[Mapping[str, Any]], profile: str
) -> str:
    """Markdown."""
    lines = [
        "# Time: predicted and measured",
        "",
        "## The survey's training throughput (arXiv 2303.15647v2, table 5)",
        "",
    ]
    lines += [(survey_time.__doc__ or "").strip(), ""]
    lines.append(" ".join((survey_time.predicted.__doc__ or "").split()))
    lines.append(
        "So it is the time to issue one microbatch and one update, whatever the microbatch, and is bound by the "
        "number of operators. edgepeft's methods are traced; the survey ran AdapterHub's `adapters` and HF peft, whose "
        "modules issue other operators and Python of their own, which no trace of ours sees. Efficiencies are data "
        "sheets' and publications' (`edgepeft/roofline.py`); none comes from this table."
    )
    for model, rows in survey.items():
        rank = survey_time.spearman(*zip(*rows.values(), strict=True))
        met = "met" if rank >= 0.9 else "NOT met"
        lines += ["", f"**{model}: Spearman {rank:.2f} over {len(rows)} methods; the target of 0.9 is {met}.**", ""]
        lines += ["| method | measured | predicted |", "|---|---|---|"]
        ordered = sorted(rows.items(), key=lambda item: -item[1][0])
        lines += [f"| {row} | {was:.1f} | {found:.1f} |" for row, (was, found) in ordered]
    errors = [row["predicted"] / row["measured"] - 1 for row in steps]
    within = sum(abs(error) <= 0.25 for error in errors)
    device = hardware.load(profile)
    lines += ["", "## Training steps on this CPU", "", (cpu_time.__doc__ or "").strip().split("\n\n")[1], ""]
    lines.append(
        f"{device.title}, torch {torch.__version__}; the machine was shared, with a load of 5 to 14. The profile is "
        "tools/probe.py's and measures primitives, not steps. Microbatches: "
        + ", ".join(f"{job.model} {job.rows} x {job.tokens}" for job in cpu_time.JOBS)
        + "."
    )
    lines += ["", f"**{within} of {len(errors)} within 25 %, median {statistics.median(map(abs, errors)):.0%}.**", ""]
    lines += ["| model | method | precision | measured s | predicted s | error |", "|---|---|---|---|---|---|"]
    for row, error in zip(steps, errors, strict=True):
        name = f"| {row['model']} | {row['method']} | {row['precision']} "
        lines.append(name + f"| {row['measured']:.2f} | {row['predicted']:.2f} | {error:+.0%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = report(survey_time.compare(), cpu_time.compare(sys.argv[1]), sys.argv[1])
    write_text(RESULTS, text)
    print(text)
