"""The planner against reality: other people's GPU runs traced again with their own harness, and our step on this CPU.

Usage: ``python benchmarks/plan.py [--part gpu|cpu]``. What was traced before is cached; both parts together are written
to ``benchmarks/results/plan.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rows
from edgepeft.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "plan.md"
BOUND = 768  # tokens: no example of MetaMathQA's run is longer (run.py truncates)
LONGEST = 701
"""Tokens of the longest batch of the MetaMathQA runs, the same for all. The data set is not to be had here, so this one
number is taken from one run that is not scored, lora/llama-3.2-3B-rank32 (20.762 GiB reserved): see the report."""
GiB = 2**30

EXCLUDED = (
    ("MetaMathQA rows of transformers 4.52 to 5.12 (superseded)", "other versions of transformers than the one here"),
    ("image generation with FLUX.2 (peft)", "needs diffusers and a model that the catalogue does not have"),
    (
        "torchtune, litgpt, torchao",
        "their own model code, torch.compile or sequence lengths of a data set: not rebuilt",
    ),
    ("fsdp_qlora", "two GPUs, FSDP"),
    (
        "LLaMA-Factory, Unsloth, odyn, qlora",
        "rounded to a GB, budgets or minima instead of peaks, set-ups not complete",
    ),
    ("xw-yao/peft_comparison", "evaluation only, lengths of the data sets not recorded"),
    ("LST, GaLore", "padding of the targets (LST) and sequence length (GaLore) not recorded"),
)
REASONS = {
    "osf": "over, not explained",
    "boft": "over, not explained; on CUDA peft may run its own kernel (fbd) where this trace runs its Python",
    "prefixtuning": "under; evaluation is not traced: generation for a batch of 50, whose cache is concatenated anew "
    "at every token",
    "frod": "over; its sparse factor is stood in for by a dense one (`answers.py`)",
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("gpu", "cpu"), help="only this part; nothing is written")
    part = parser.parse_args(argv).part
    text = ""
    if part != "cpu":
        text += gpu()
    if part != "gpu":
        text += cpu()
    if part is None:  # part C is written by hand: its rows are processes of their own
        by_hand = "".join(RESULTS.read_text(encoding="utf-8").partition("\n## C. ")[1:])
        write_text(RESULTS, text + by_hand)
    print(text)


def gpu() -> str:
    """Part A as markdown."""
    every = rows.read()
    t4 = [row for row in every if row.harness == "t4"]
    peft = [row for row in every if row.harness == "metamath"]
    wanted: list[Any] = [("t4", row.setup, None) for row in t4]
    wanted += [("metamath", {**row.setup, "tokens": LONGEST}, None) for row in peft]
    found = []
    for row, answer in zip((*t4, *peft), rows.traced(wanted), strict=True):
        print(f"{row.label}: {'failed' if 'error' in answer else 'traced'}", file=sys.stderr, flush=True)
        found.append(answer)
    first, second = found[: len(t4)], found[len(t4) :]
    allocated = [_error(row.allocated_bytes, answer, "allocated_bytes") for row, answer in zip(t4, first, strict=True)]
    reserved = [_error(row.reserved_bytes, answer, "reserved_bytes") for row, answer in zip(t4, first, strict=True)]
    whole = [_error(row.reserved_bytes, answer, "reserved_bytes") for row, answer in zip(peft, second, strict=True)]
    lines = [
        "# The planner's traces against measured peaks\n",
        "## A. Other people's GPU runs, traced again with their own harness\n",
        "| rows | quantity | n | median | 90 % within | worst | most under | target |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        _summary("T4 (fitcheck-llm)", "allocated", allocated, "median 0.3 %, worst 1.5 %"),
        _summary("T4 (fitcheck-llm)", "reserved", reserved, "none set; hangs on the order of requests"),
        _summary(
            "MetaMathQA (peft), L40S",
            "reserved, whole run",
            whole,
            "median 1 %, 90 % within 5 %: not claimed, one length is fitted (below)",
        ),
        _coverage(),
        "No run here ran out of memory.\n",
        "| row | measured GiB | predicted GiB | error | reserved: measured | predicted | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.label} | {_gib(row.allocated_bytes)} | {_gib(answer.get('allocated_bytes'))} | {_percent(a)} "
            f"| {_gib(row.reserved_bytes)} | {_gib(answer.get('reserved_bytes'))} | {_percent(r)} |"
            for row, answer, a, r in zip(t4, first, allocated, reserved, strict=True)
        ),
        "\n| MetaMathQA experiment | reserved: measured GiB | predicted GiB | error | why it misses |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row.label} | {_gib(row.reserved_bytes)} | {_gib(answer.get('reserved_bytes'))} | {_percent(error)} "
            f"| {_reason(row.label, error, answer)} |"
            for row, answer, error in zip(peft, second, whole, strict=True)
        ),
        _LENGTH,
        "\nNot rebuilt, and why:\n",
        *(f"- {name}: {why}." for name, why in EXCLUDED),
    ]
    return "\n".join(lines) + "\n"


def cpu() -> str:
    """Part B as markdown."""
    import reality

    cases = reality.cases()
    wanted: list[Any] = [("reality", {"method": m, "family": f, "at": at}, None) for m, f, at in cases]
    errors, misses, refused, failed = [], [], 0, []
    for case, answer in zip(cases, rows.traced(wanted), strict=True):
        name = " ".join(case)
        if "error" in answer:
            failed.append(f"- {name}: {answer['error']}")
        elif "refused" in answer:
            refused += 1
        else:
            errors.append(answer["predicted"] / answer["measured"] - 1)
            if abs(errors[-1]) > 0.03:
                misses.append(f"- {name}: {errors[-1]:+.1%}")
    lines = [
        "\n## B. edgepeft's training step on this CPU\n",
        "Every method, family and precision, small models; bytes of tensors at the peak, a whole step.\n",
        "| n | refused by the method | median | 90 % within | worst | most under | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        _summary(f"{len(errors)} | {refused}", "", errors, "median 1 %, worst 3 %").replace(
            f" |  | {len(errors)} |", " |"
        ),
        *(["\nWorse than 3 %:\n", *misses] if misses else []),
        *(["\nFailed:\n", *failed] if failed else []),
    ]
    return "\n".join(lines) + "\n"


_LENGTH = f"""
**The longest batch.** These runs pad a batch to its longest example and cut examples at {BOUND} tokens; which is the
longest of the first 20,000 is recorded nowhere, and the data set was not to be had. It is one number for all runs. Here
it is {LONGEST}, the length at which one run that is *not* in the table, `lora/llama-3.2-3B-rank32` (20.762 GiB), comes
out right: an inference from one measurement, so the level of the other rows rests on it, and only their differences are
predicted without it. At the bound of {BOUND} tokens every row comes out about 6 % higher."""


def _coverage() -> str:
    """Whether every experiment of peft's comparison can be traced, measured here or not; shallow, which is enough."""
    import metamath

    wanted = [("metamath", {"experiment": name, "tokens": 128}, 2) for name in metamath.EXPERIMENTS]
    failed = {
        each[1]["experiment"]: answer["error"]
        for each, answer in zip(wanted, rows.traced(wanted), strict=True)
        if "error" in answer
    }
    why = "".join(f"; {name} fails: {error}" for name, error in failed.items())
    return f"\nOf peft's {len(wanted)} MetaMathQA experiments {len(wanted) - len(failed)} can be traced{why}.\n"


def _error(measured: float | None, answer: dict[str, Any], name: str) -> float | None:
    return None if measured is None or name not in answer else answer[name] / measured - 1


def _summary(name: str, quantity: str, found: Iterable[float | None], target: str) -> str:
    errors = [error for error in found if error is not None]
    if not errors:
        return f"| {name} | {quantity} | 0 | | | | | {target} |"
    sizes = sorted(abs(error) for error in errors)
    ninety = sizes[max(0, -(-len(sizes) * 9 // 10) - 1)]
    return (
        f"| {name} | {quantity} | {len(errors)} | {statistics.median(sizes):.2%} | {ninety:.2%} | {sizes[-1]:.2%} "
        f"| {min(errors):+.2%} | {target} |"
    )


def _reason(label: str, error: float | None, answer: dict[str, Any]) -> str:
    if error is None:
        return str(answer.get("error", ""))
    return REASONS.get(label.split("/")[0], "") if abs(error) > 0.03 else ""


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GiB:.3f}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.2%}"


if __name__ == "__main__":
    main(sys.argv[1:])
