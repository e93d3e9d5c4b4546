"""edgepeft's side: its backbone, its method and its training step, as ``edgepeft train`` puts them together."""

from __future__ import annotations

import torch

import job
import measure
from edgepeft import backbone, heap
from edgepeft.methods import base
from edgepeft.step import Batch, TrainingStep


def _batches(steps: int) -> list[Batch]:
    """Every token that has one before it is a target."""
    ids = torch.tensor(job.rows(steps)).view(steps, job.MICROBATCH, job.TOKENS)
    positions = torch.arange(job.MICROBATCH * job.TOKENS).view(job.MICROBATCH, job.TOKENS)[:, :-1].flatten()
    return [{"input_ids": batch, "target_positions": positions, "target_ids": batch[:, 1:].flatten()} for batch in ids]


def main() -> None:
    given = measure.arguments()
    torch.manual_seed(job.SEED)
    loaded = backbone.load(backbone.resolve(str(job.MODEL)), task="causal-lm", at=given.precision)
    options = {"rank": job.RANK, "alpha": float(job.ALPHA)} if given.method == "lora" else {}
    method = base.create(given.method, options)
    base.apply(method, loaded)
    model = loaded.model.train()
    lr = job.LEARNING_RATE[given.method]
    step = TrainingStep(
        model,
        method.optimizer(model, lr, 0.0),
        clip_norm=job.CLIP_NORM,
        penalty=method.penalty,
        after_update=method.after_update,
    )
    watch = measure.chosen(given.trace)
    losses = []
    with heap.ample():
        for batch in _batches(given.steps):
            watch.begin(model, step.optimizer)
            loss = step.backward([batch], lr)
            step.update()
            watch.end(step.optimizer)
            losses.append(float(loss))
    measure.report(watch, losses, model)


if __name__ == "__main__":
    main()
