"""What a training process takes of a CPU machine: resident memory at its highest, predicted and measured.

Usage: ``python benchmarks/resident.py``; every case is a process of its own. Its lines are part C of
``results/plan.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import cpu_time
from edgepeft import backbone, candidate, hardware, probe, traces
from edgepeft.methods import base
from edgepeft.surface import TRAINING, Configuration

STEPS = 3
MiB = 2**20


def measured(job: cpu_time.Job, method: str, at: str) -> dict[str, float]:
    """Bytes at the highest, and processor seconds of the quickest step, of loading a checkpoint and training it."""
    import edgepeft.train  # noqa: F401  # what a run has imported

    source = backbone.resolve(str(cpu_time.ROOT / "models" / job.model))
    labels = ["a", "b"] if job.task == "classification" else None
    step = cpu_time.step_of(backbone.load(source, task=job.task, at=at, labels=labels), base.create(method))
    rows, taken = cpu_time.batch(job), []
    for _ in range(STEPS):
        started = time.process_time()
        step.backward([rows], 1e-3)
        step.update(0.5)
        taken.append(time.process_time() - started)
    with open("/proc/self/status", encoding="utf-8") as file:
        highest = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    return {"bytes": highest * 1024, "seconds": min(taken[1:])}


def predicted(job: cpu_time.Job, method: str, at: str) -> tuple[int, int]:
    """Bytes of tensors at the peak of loading and training, and of the process, as ``edgepeft plan`` has them."""
    configuration = backbone.config(backbone.resolve(str(cpu_time.ROOT / "models" / job.model)))
    (found,) = traces.find(
        [
            Configuration(
                model=probe.as_fields(configuration),
                task=job.task,
                method=method,
                options={},
                precision=at,
                checkpointing=False,
                microbatch=1,
                tokens=job.tokens,
                target_tokens=1,
                labels=2,
                accumulates=False,
                cuda=False,
                bf16=hardware.load("auto").bf16,
            )
        ]
    )
    assert not isinstance(found, Exception), found
    only = [phase for phase in TRAINING if phase not in ("evaluation", "checkpoint")]
    tensors = found.reserved_bytes(job.rows, only)
    return tensors, candidate.needed_bytes(tensors, hardware.load("auto"))


def cases() -> Iterator[tuple[cpu_time.Job, str, str]]:
    for job in cpu_time.JOBS:
        for method, at in cpu_time.CASES:
            yield job, method, at


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        job = next(job for job in cpu_time.JOBS if job.model == sys.argv[1])
        print(json.dumps(measured(job, *sys.argv[2:])))
        sys.exit()
    for job, method, at in cases():
        command = [sys.executable, __file__, job.model, method, at]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:  # a method that is not for the model says so
            print(job.model, method, at, done.stderr[-300:], file=sys.stderr)
            continue
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        tensors, process = predicted(job, method, at)
        numbers = tensors / MiB, found["bytes"] / MiB, process / MiB
        cells = " | ".join(f"{number:.0f}" for number in numbers)
        name = f"{job.model} {method} {at}, {job.rows} x {job.tokens}"
        print(f"| {name} | {cells} | {process / found['bytes'] - 1:+.1%} |", flush=True)
