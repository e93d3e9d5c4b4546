"""Training steps on this CPU: processor seconds predicted from traces and a probed profile, against measured ones.

One thread and processor seconds on both sides, so that other processes on the machine do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgepeft import backbone, hardware, heap, precision, roofline
from edgepeft.methods import base
from edgepeft.step import TrainingStep
from edgepeft.trace import fake_device

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


class Job(NamedTuple):
    model: str
    task: str
    rows: int
    tokens: int


JOBS = (Job("minilm-l6", "classification", 8, 128), Job("smollm2-135m-instruct", "causal-lm", 2, 128))
METHODS = ("full", "ln_tuning", "bitfit", "houlsby", "prefix_tuning", "ia3", "compacter", "dora", "krona")
CASES = [(method, at) for method in ("lora", "lst") for at in ("fp32", "bf16", "nf4")]
CASES += [(method, "bf16") for method in METHODS]


def batch(job: Job) -> dict[str, torch.Tensor]:
    """Random tokens without padding, every one a target of a decoder."""
    ids = torch.randint(5, 1000, (job.rows, job.tokens), generator=torch.Generator().manual_seed(0))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if job.task == "classification":
        return made | {"labels": torch.arange(job.rows) % 2}
    return made | {"target_positions": torch.arange(ids.numel()), "target_ids": ids.flatten()}


def step_of(found: backbone.Backbone, method: base.Method) -> TrainingStep:
    """The step that ``edgepeft train`` runs."""
    base.apply(method, found)
    model: Any = found.model
    model.train()
    optimizer = method.stages()[0].optimizer(model, 1e-3, 0.0)
    norm = None if method.updates_in_backward else 1.0
    return TrainingStep(model, optimizer, clip_norm=norm, penalty=method.penalty, after_update=method.after_update)


def measured(job: Job, method: str, at: str) -> float:
    """Processor seconds of a training step, the best of a few: the one that other processes disturbed least."""
    source = backbone.resolve(str(ROOT / "models" / job.model))
    labels = ["a", "b"] if job.task == "classification" else None
    step = step_of(backbone.load(source, task=job.task, at=at, labels=labels), base.create(method))
    rows, taken = batch(job), []
    with heap.ample():
        for _ in range(STEPS + 1):
            started = time.process_time()
            step.backward([rows], 1e-3)
            step.update(0.5)
            taken.append(time.process_time() - started)
    return min(taken[1:])


def predicted(job: Job, method: str, at: str, device: hardware.Hardware) -> float:
    """The same step on fake tensors, at the device's speeds."""
    configuration = backbone.config(backbone.resolve(str(ROOT / "models" / job.model)))
    del configuration._name_or_path
    from transformers import AutoConfig

    fields = backbone.as_fields(configuration)
    with precision.emulating(bf16=device.bf16), fake_device(cuda=False) as tracker:
        made = AutoConfig.for_model(fields.pop("model_type"), **fields)
        step = step_of(backbone.skeleton(made, task=job.task, at=at, labels=2), base.create(method))
        rows = {name: torch.ones(value.shape, dtype=value.dtype) for name, value in batch(job).items()}
        for phase in ("first", "steady"):
            with tracker.phase(phase):
                step.backward([rows], 1e-3)
                step.update(0.5)
        return roofline.seconds(tracker.work()["steady"], device)


def compare(profile: str) -> list[dict[str, Any]]:
    """A few methods of every kind on both models, each in a process of its own."""
    found = []
    for job in JOBS:
        for method, at in CASES:
            command = [sys.executable, __file__, profile, job.model, method, at]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"model": job.model, "method": method, "precision": at}
            if done.returncode:
                print(job.model, method, at, done.stderr[-300:], file=sys.stderr)
                continue
            found.append(row | json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = next(job for job in JOBS if job.model == sys.argv[2])
    device = hardware.load(sys.argv[1])
    values = {
        "measured": measured(chosen, sys.argv[3], sys.argv[4]),
        "predicted": predicted(chosen, sys.argv[3], sys.argv[4], device),
    }
    print(json.dumps(values))
