"""What was measured as a table: the sides, their ratios beside the targets, and the machine it was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import job
from edgepeft import machine as system

PACKAGES = ("edgepeft", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
TELLING = ("avx", "amx", "asimd", "bf16", "i8mm", "sve", "fma", "f16c")  # how the interesting instruction sets begin


@dataclass(frozen=True)
class Comparison:
    """Two sides, and the targets: at most this share of the peer's bytes, at least this multiple of its speed."""

    name: str
    peer: str
    ours: str
    memory_target: float | None
    speed_target: float | None


WANTED = (
    Comparison("LoRA on bf16", "peer-lora-bf16", "edgepeft-lora-bf16", None, None),
    Comparison("LoRA on NF4 (QLoRA)", "peer-lora-nf4", "edgepeft-lora-nf4", 0.55, 1.0),
    Comparison("LST on NF4, against the peer's QLoRA", "peer-lora-nf4", "edgepeft-lst-nf4", 0.22, 1.5),
    Comparison("QLoRA, against a peer computing in fp32", "peer-lora-nf4-fp32", "edgepeft-lora-nf4", None, None),
    Comparison("LST on NF4, against a peer computing in fp32", "peer-lora-nf4-fp32", "edgepeft-lst-nf4", None, None),
)


def machine() -> dict[str, Any]:
    """The processor, its cores and instruction sets, how busy it was before, and the versions of what ran."""
    processor = system.processor()
    return {
        "processor": processor.title,
        "cores": system.cores(),
        "memory_bytes": system.memory().total_bytes,
        "instruction_sets": sorted(flag for flag in processor.flags if flag.startswith(TELLING)),
        "load_before": os.getloadavg()[0],
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def comparisons(sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each comparison: edgepeft's bytes as shares of the peer's, and its speed as a multiple."""
    rows = []
    for wanted in WANTED:
        peer, ours = sides[wanted.peer], sides[wanted.ours]
        rows.append(
            {
                **asdict(wanted),
                "memory_ratio": ours["peak_tensor_bytes"] / peer["peak_tensor_bytes"],
                "rss_ratio": ours["peak_rss_bytes"] / peer["peak_rss_bytes"],
                "speed_ratio": peer["seconds_per_step"] / ours["seconds_per_step"],
                "cpu_speed_ratio": peer["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"],
            }
        )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """The whole report. ``found``: what ``run.py`` prints as JSON."""
    on, rounds = found["machine"], found["rounds"]
    sides = [
        [
            name,
            _mb(side["peak_tensor_bytes"]),
            _mb(side["peak_rss_bytes"]),
            f"{side['seconds_per_step']:.2f}",
            f"{side['cpu_seconds_per_step']:.2f}",
            f"{side['tokens_per_second']:.0f}",
            f"{side['losses'][0]:.3f}",
            f"{side['losses'][1]:.3f}",
        ]
        for name, side in found["sides"].items()
    ]
    ratios = [
        [
            row["name"],
            _against(row["memory_ratio"], row["memory_target"], most=True),
            f"{row['rss_ratio']:.2f}",
            _against(row["speed_ratio"], row["speed_target"], most=False),
            f"{row['cpu_speed_ratio']:.2f}",
        ]
        for row in found["comparisons"]
    ]
    kinds = list(next(iter(found["sides"].values()))["bytes"])
    parts = [[name, *(_mb(side["bytes"][kind]) for kind in kinds)] for name, side in found["sides"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    return f"""# edgepeft and its peer at the same job

SmolLM2-135M, microbatch {job.MICROBATCH} x {job.TOKENS} tokens, all of them targets; LoRA of rank {job.RANK} on all
linears. The peer is HF peft, transformers' Trainer and bitsandbytes. `benchmarks/README.md` says what is counted how.

- {on["date"]}: {on["processor"]}, cores: {on["cores"]}, memory: {_mb(on["memory_bytes"])} MB
- instruction sets: {" ".join(on["instruction_sets"])}
- threads: {on["threads"]}; load before the run: {on["load_before"]:.1f}
- Python {on["python"]}, {versions}
- each side: processes: {rounds}, in turn; timed steps in each: {found["timed_steps"]}; medians over all

## edgepeft / peer

{_table(["job", "peak tensor bytes", "peak RSS", "speed", "speed by CPU seconds"], ratios)}

## Sides (MB = 10^6 bytes)

{_table(["side", "peak tensor MB", "peak RSS MB", "s/step", "CPU s/step", "tokens/s", "loss 1", "loss 2"], sides)}

## Tensor MB at the peak, by kind

{_table(["side", *kinds], parts)}
"""


def _against(ratio: float, target: float | None, *, most: bool) -> str:
    if target is None:
        return f"{ratio:.2f}"
    reached = ratio <= target if most else ratio >= target
    return f"{ratio:.2f} (target {'≤' if most else '≥'} {target:g}: {'met' if reached else 'missed'})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        from edgepeft import __version__  # a checkout that is not installed; every other name here is

        return __version__
