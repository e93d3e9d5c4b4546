"""Training: microbatches to updates, evaluation, checkpoints, and the same end however often it was interrupted."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from edgepeft import adapter, checkpoint, counts, events, shards
from edgepeft.answers import Questions
from edgepeft.backbone import Backbone
from edgepeft.data import Data
from edgepeft.errors import EdgePeftError
from edgepeft.evaluate import better, evaluate, validation_batches
from edgepeft.files import remove_leftovers
from edgepeft.methods import base
from edgepeft.methods.base import Method
from edgepeft.ranks import ALONE, Ranks
from edgepeft.recipe import Recipe
from edgepeft.schedule import check, learning_rate, legs, total_steps
from edgepeft.step import Batch, TrainingStep, recompute_activations, unpadded
from edgepeft.surface import ADAMW
from edgepeft.watch import peak

CHECKPOINT_SECONDS = 600  # at most this much work is lost to a kill
MEASURED_STEPS = 2  # of each stage: in the second the longest batch meets optimizer states and others' gradients


class Interrupted(EdgePeftError):
    """Ctrl-C: the run stopped after a whole step and can go on."""

    exit_code = 130


@dataclass(frozen=True)
class Trained:
    """How training ended: where the best adapter is, its metrics, the peak of tensor bytes that was measured, the
    parameters trained in the stage with the most, what each stage took (``ledger.Row.stages``), and what the best
    adapter answers to ``Questions``.
    """

    adapter: Path
    metrics: dict[str, float]
    measured_peak_bytes: int
    trained_parameters: int
    stages: list[dict[str, Any]]
    answers: list[str]


@dataclass
class _Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0
    best: dict[str, float] | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    answers: list[str] = field(default_factory=list)  # of the best
    stages: list[dict[str, Any]] = field(default_factory=list)  # what each stage that began took
    phases: dict[str, int] = field(default_factory=dict)  # most bytes of tensors, by the names that a plan has for them

    @property
    def peak_bytes(self) -> int:
        """Of the steps alone."""
        return max((stage["peak_bytes"] for stage in self.stages), default=0)


def train(
    recipe: Recipe,
    backbone: Backbone,
    method: Method,
    data: Data,
    out: Path,
    *,
    start: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Trained:
    """Train ``backbone`` (with ``method`` already applied) and leave the best adapter in ``out/adapter``.

    Goes on from the newest checkpoint in ``out/checkpoints`` when there is one.

    Args:
        start: details for the log's first event, such as the predicted peak.
        ranks: who trains it together, each with a copy of the model or, if sharded, with a part; the first writes.

    Raises:
        EdgePeftError: the loss is not finite, gradients do not reach what is trained, or a checkpoint is damaged.
        Interrupted: after Ctrl-C, with a checkpoint saved.
    """
    return _Run(recipe, backbone, method, data, out, ranks).run(start)


class _Run:
    def __init__(self, recipe: Recipe, backbone: Backbone, method: Method, data: Data, out: Path, ranks: Ranks) -> None:
        check(recipe, method)
        self.recipe, self.method, self.data, self.out, self.ranks = recipe, method, data, out, ranks
        self.backbone, self.model = backbone, backbone.model
        self._begin_alike()
        shards.divide(backbone, ranks)
        self.device = next(self.model.parameters()).device
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            log_with="tensorboard" if ranks.first else None,
            project_dir=str(out / "tensorboard"),
        )
        self.rate = recipe.lr if recipe.lr is not None else method.learning_rate
        self.legs = legs(recipe, method, len(data.train))
        self.leg = 0
        self.step = self._step_of_leg()
        self.total = self.legs[-1].last
        self.interval = max(1, math.ceil(total_steps(recipe, len(data.train)) / recipe.evaluations))
        self.questions = Questions.of(data)
        self.progress = _Progress()
        self.interrupted = False
        self.card = adapter.card(
            method,
            model=recipe.model,
            task=backbone.task,
            precision=backbone.precision,
            labels=data.labels,
            seed=recipe.seed,
        )

    def run(self, start: dict[str, Any]) -> Trained:
        self.accelerator.init_trackers("edgepeft")
        self.model.train()
        if self.recipe.checkpointing:
            recompute_activations(self.model)
        torch.manual_seed(self.recipe.seed)
        if self.ranks.first:
            remove_leftovers(self.out)
        self.ranks.wait()
        newest = checkpoint.newest(self.out / "checkpoints")
        if newest is not None:
            while self.legs[self.leg].last < checkpoint.step_of(newest):
                self._next_leg()
            self.progress = _Progress(**checkpoint.restore(newest, self.model, self.step.optimizer))
        kept = self.out / "events.jsonl" if self.ranks.first else None
        log = events.EventLog(kept, self.progress.step if newest else None)
        if newest is None:
            log.write("start", 0, total_steps=self.total, **start)
        else:
            log.write("resume", self.progress.step)
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self._interrupt) if main else None
        try:
            self._loop(log)
            done = self._finish(log)
            if self.interrupted:  # too late for the loop to see
                raise self._stopped()
            return done
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
            log.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _loop(self, log: events.EventLog) -> None:
        saved = time.monotonic()
        with events.progress_bar(self.total, self.progress.step, shown=self.ranks.first) as advance:
            for microbatches in self._remaining():
                while self.progress.step == self.legs[self.leg].last:
                    self._next_leg()
                if self.recipe.patience is not None and self.progress.waited >= self.recipe.patience:
                    break
                done = self._one(microbatches)
                log.write("step", self.progress.step, **done)
                self.accelerator.log({k: v for k, v in done.items() if v is not None}, step=self.progress.step)
                advance(done)
                ended = self.progress.step == self.legs[self.leg].last
                if evaluated := self._is_evaluated():
                    self._evaluate(log)
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                stopping, late = map(bool, self.ranks.largest([self.interrupted, late]))
                if evaluated or ended or stopping or late:
                    with self._watched_once("checkpoint"):
                        where, state = self.out / "checkpoints", dict(vars(self.progress))
                        checkpoint.save(where, self.model, self.step.optimizer, state, self.ranks)
                    log.write("checkpoint", self.progress.step)
                    saved = time.monotonic()
                if stopping:
                    self.ranks.wait()
                    raise self._stopped()

    def _stopped(self) -> Interrupted:
        return Interrupted(
            f"Stopped after step {self.progress.step} of {self.total}.",
            "You pressed Ctrl-C; the work so far is saved.",
            "Run the same command again to go on.",
        )

    def _remaining(self) -> Iterator[list[Batch]]:
        """The microbatches of every update still to do.

        Their order follows from the recipe alone, so that a resumed run sees what an uninterrupted one would have seen.
        """
        assert self.recipe.microbatch is not None
        for number, leg in enumerate(self.legs):
            size = 1 if leg.stage.one_by_one else self.recipe.microbatch
            accumulation = 1 if leg.stage.one_by_one else self.recipe.global_batch // size
            # The longest batch comes in the second update, on top of all that stays from one update to the next and,
            # where there are others before it, of their gradients; the second longest is the very first.
            heaviest = (accumulation + min(1, accumulation - 1), 0) if leg.last > leg.first else (0,)
            updates = self._updates(size, accumulation, self.recipe.seed + number, heaviest)
            for step, parts in zip(range(leg.first, leg.last + 1), updates, strict=False):
                if step > self.progress.step:
                    yield [unpadded(self.data.train.collate(part)) for part in parts]

    def _updates(self, size: int, accumulation: int, seed: int, heaviest: tuple[int, ...]) -> Iterator[list[list[int]]]:
        """The examples of the microbatches of every update, epoch after epoch without end."""
        for epoch in itertools.count():
            order = self.data.train.microbatches(size, seed=seed, epoch=epoch, longest_at=() if epoch else heaviest)
            for first in range(0, len(order), accumulation):
                yield order[first : first + accumulation]

    def _step_of_leg(self) -> TrainingStep:
        """The training step of the current leg, whose stage has begun."""
        stage = self.legs[self.leg].stage
        clips = not (stage.measures or self.method.updates_in_backward)
        return TrainingStep(
            self.model,
            stage.made(self.model, self.rate, self.recipe.weight_decay, self.recipe.optimizer or ADAMW),
            clip_norm=self.recipe.clip_norm if clips else None,
            backward=self.accelerator.backward,
            penalty=self.method.penalty,
            after_update=self.method.after_update,
            ranks=self.ranks,
            summed=stage.one_by_one,
        )

    def _begin_alike(self) -> None:
        """Let what a stage begins with be the same numbers on all ranks."""
        self.ranks.share(base.state(self.model, transient=True).values())

    def _next_leg(self) -> None:
        self.leg += 1
        base.begin(self.method, self.backbone, self.leg)
        self._begin_alike()
        self.model.train()
        self.step = self._step_of_leg()

    def _one(self, microbatches: list[Batch]) -> dict[str, Any]:
        """One update, and what there is to say of it."""
        started = time.perf_counter()
        step = self.progress.step + 1
        leg = self.legs[self.leg]
        if step == leg.first:
            self._begin_accounts()
        lr = learning_rate(self.recipe, self.rate, step - leg.first + 1, leg.last - leg.first + 1)
        watched: dict[str, int] = {}
        loss, norm = self._update(microbatches, lr, step, watched)
        seconds = time.perf_counter() - started
        tokens = sum(batch["input_ids"].numel() for batch in microbatches)
        self.progress.step = step
        took = self.progress.stages[-1]
        took["updates"] += 1
        took["peak_bytes"] = max(took["peak_bytes"], *watched.values(), 0)
        prefix = f"{leg.stage.name}: " if len(self.legs) > 1 else ""
        for name, size in watched.items():
            self.progress.phases[prefix + name] = max(self.progress.phases.get(prefix + name, 0), size)
        slowed = bool(watched) and self.device.type != "cuda"
        for of in ("",) if slowed else ("", "timed_"):
            took[f"{of}seconds"] += seconds
            took[f"{of}tokens"] += tokens
        return {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "memory_bytes": events.memory_bytes(self.device),
        }

    def _begin_accounts(self) -> None:
        stage = self.legs[self.leg].stage
        trained = 0 if stage.measures else sum(parameter.numel() for parameter in self.step.trained)
        took = {"name": stage.name, "trained": trained, "updates": 0, "peak_bytes": 0}
        took |= dict.fromkeys(("seconds", "timed_seconds"), 0.0) | dict.fromkeys(("tokens", "timed_tokens"), 0)
        self.progress.stages.append(took)

    def _update(
        self, microbatches: list[Batch], lr: float, step: int, watched: dict[str, int]
    ) -> tuple[float, float | None]:
        """Loss and norm of one update. What its phases hold goes into ``watched`` in the first updates of a stage."""
        leg = self.legs[self.leg]
        watching = self.device.type == "cuda" or step < leg.first + MEASURED_STEPS

        def phase(name: str) -> contextlib.AbstractContextManager[None]:
            return peak(watched, name, self.model, self.step.optimizer) if watching else contextlib.nullcontext()

        with phase("forward+backward"), self.ranks.drawing_apart(self.recipe.seed, step):
            loss = self._finite(float(self.step.backward(microbatches, lr)), "loss", step)
        if step == leg.first and not self.method.updates_in_backward:
            _check_gradients(self.model)
        with phase("update"), self.ranks.drawing_for_parts(self.recipe.seed, step, 1):
            norm = self.step.update((step - leg.first + 1) / (leg.last - leg.first + 1))
        watched.update(zip(watched, self.ranks.largest([*watched.values()]), strict=True))
        return loss, None if norm is None else self._finite(float(shards.whole(norm)), "gradient's norm", step)

    def _watched_once(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Measure a phase, unless it was measured before: all its repetitions hold the same."""
        if name in self.progress.phases:
            return contextlib.nullcontext()
        return peak(self.progress.phases, name, self.model, self.step.optimizer)

    def _finite(self, value: float, what: str, step: int) -> float:
        """``value``, before anything is written that depends on it."""
        if not math.isfinite(value):
            lower = min(self.rate / 3, self.method.learning_rate)
            raise EdgePeftError(
                f"The {what} became {value} at step {step}.",
                f"The learning rate was at most {self.rate:.2g}; a rate too high for the method is the usual cause.",
                f"Run with --set lr={lower:.1g} into another folder. The last checkpoint is as it was.",
            )
        return value

    def _is_evaluated(self) -> bool:
        """Whether the update just made is followed by an evaluation; none is in a stage that only measures."""
        leg = self.legs[self.leg]
        if leg.stage.measures:
            return False
        return (self.progress.step - leg.first + 1) % self.interval == 0 or self.progress.step == leg.last

    def _evaluate(self, log: events.EventLog) -> None:
        with self._watched_once("evaluation"):
            metrics = evaluate(self.model, validation_batches(self.data, self.recipe), self.ranks)
            answers = self.questions.answered(self.model)
        shards.settle(self.model)
        phases = self.progress.phases
        phases.update(zip(phases, self.ranks.largest([*phases.values()]), strict=True))
        self._finite(metrics["loss"], "validation loss", self.progress.step)
        leg = self.legs[self.leg]
        progress = (self.progress.step - leg.first + 1) / (leg.last - leg.first + 1)
        last = leg.last == self.total and self.method.is_final(progress)  # an adapter is what the last stage trains
        best = last and better(self.backbone.task, metrics, self.progress.best)
        if best:
            adapter.save(self.out / "checkpoints" / "best", self.model, self.card, self.ranks)
            self.progress.best, self.progress.best_step, self.progress.waited = metrics, self.progress.step, 0
            self.progress.answers = answers
        elif last:
            self.progress.waited += 1
        log.write("evaluation", self.progress.step, metrics=metrics, answers=answers, best=best)
        self.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=self.progress.step)

    def _finish(self, log: events.EventLog) -> Trained:
        self.ranks.wait()
        adapter.load(self.out / "checkpoints" / "best", self.model)
        while self.leg < len(self.legs) - 1:  # a last stage without updates
            self._next_leg()
        adapter.save(self.out / "adapter", self.model, self.card, self.ranks)
        self.model.eval()
        assert self.progress.best is not None
        stages = [{**stage, "tokens_per_second": counts.speed([stage])} for stage in self.progress.stages]
        log.write(
            "end",
            self.progress.step,
            measured_peak_bytes=self.progress.peak_bytes,
            measured_phases=self.progress.phases,
            measured_process_bytes=events.most_bytes(self.device),
            seconds=sum(stage["seconds"] for stage in stages),
            tokens_per_second=counts.speed(stages),
            stages=stages,
            metrics=self.progress.best,
            best_step=self.progress.best_step,
        )
        most = max(stage["trained"] for stage in stages)
        peak_bytes, answers = self.progress.peak_bytes, self.progress.answers
        return Trained(self.out / "adapter", self.progress.best, peak_bytes, most, stages, answers)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.interrupted = True
        if self.ranks.first:
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")  # print might be at work itself


def _check_gradients(model: nn.Module) -> None:
    missing = [name for name, parameter in adapter.trained(model).items() if parameter.grad is None]
    if missing:
        raise EdgePeftError(
            f"No gradient reaches {len(missing)} of the trained tensors, such as {missing[0]}.",
            "They would never change; the method and this model do not fit each other.",
            "Please report it with the recipe; another method will work meanwhile.",
        )
