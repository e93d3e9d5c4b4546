"""plan → train → merge → export → package: every stage skips work whose inputs have not changed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgepeft import (
    adapter,
    backbone,
    bring,
    counts,
    data,
    deploy,
    ledger,
    precision,
    probe,
    report,
    runplan,
    schedule,
    shards,
    watch,
    whole,
)
from edgepeft import merge as merging
from edgepeft import recipe as recipes
from edgepeft import train as training
from edgepeft.answers import Questions
from edgepeft.aside import device_after
from edgepeft.backbone import Backbone, Source
from edgepeft.data.tokens import check_vocabulary, pad_id
from edgepeft.errors import UsageError
from edgepeft.evaluate import evaluate, validation_batches
from edgepeft.files import remove_leftovers, size_bytes, write_json
from edgepeft.fingerprints import fingerprint
from edgepeft.hardware import load as load_hardware
from edgepeft.heap import ample
from edgepeft.launch import threads, train_together, usable
from edgepeft.ledger import Row
from edgepeft.methods import base
from edgepeft.placements import eight_bit
from edgepeft.ranks import ALONE, Ranks
from edgepeft.recipe import Recipe
from edgepeft.surface import EIGHT_BIT
from edgepeft.tasks import check as check_task
from edgepeft.workspace import PLANNED, Workspace, without_alias

STAGES = ("plan", "train", "merge", "export")

Say = Callable[[str], None]


def run(wanted: Recipe, out: Path, *, until: str = STAGES[-1], say: Say = lambda line: None) -> Workspace:
    """Do every stage up to ``until`` in ``out``; the last one leaves a device folder, and each a report.

    Raises:
        UsageError: something about the input is wrong; found before work starts.
        EdgePeftError: a stage failed; what was finished before stays.
    """
    space = Workspace(out)
    with space.alone():
        if space.recipe.exists():
            remove_leftovers(out)
        job = _Job(wanted, out, until, say)
        with threads(job.hardware):
            for stage in STAGES[: STAGES.index(until) + 1]:
                with report.afterwards(space.root):
                    getattr(job, stage)()
    return space


def fit(recipe: Recipe, out: Path, ranks: Ranks, say: Say) -> None:
    """One process's part in training the run that is planned in ``out``; the first one says how it goes.

    Raises:
        EdgePeftError: as ``run`` does.
    """
    job = _Job(recipe, out, "train", lambda line: None)
    job.say = say if ranks.first else job.say
    with threads(job.hardware, ranks.count):
        job.fit(ranks)


class _Job:
    """The stages of one run. What they share is loaded when first needed."""

    def __init__(self, wanted: Recipe, out: Path, until: str, say: Say) -> None:
        self.space, self.say, self.until = Workspace(out), say, until
        self.held: dict[str, int] = {}  # phase → bytes it was measured to hold, beside those of training
        devices = 1 if self.space.adapter.exists() else wanted.devices  # only training takes several
        self.hardware = usable(load_hardware(wanted.hardware), devices)
        self.device: str = self.hardware.kind  # on which models are loaded
        self.asked = without_alias(wanted)
        wanted = self.space.adopt(wanted)
        if wanted.optimizer == EIGHT_BIT:
            eight_bit.check(self.hardware.kind)
        self.source: Source = backbone.resolve(wanted.model)
        self.config = backbone.config(self.source, trust_remote_code=wanted.trust_remote_code)
        tokenizer = backbone.tokenizer(self.source, trust_remote_code=wanted.trust_remote_code)
        tokens = runplan.max_tokens(wanted, self.config)
        self.recipe = dataclasses.replace(wanted, max_tokens=tokens)
        method = None if wanted.method is None else base.create(wanted.method, wanted.options)
        if method is not None:  # refuse what cannot be trained before the data is read
            schedule.check(self.recipe, method)
            if until == "export":
                method.check_export()
        if not self.space.recipe.exists():  # a run that has one was planned
            task = data.task_of(wanted.data, task=wanted.task, columns=wanted.columns, validation=wanted.validation)
            check_task(self.config, task)
            probe.refuse(backbone.as_fields(self.config), task, method)
        self.data = data.load(
            self.recipe.data,
            tokenizer=tokenizer,
            cache=self.space.cache,
            task=self.recipe.task,
            columns=self.recipe.columns,
            validation=self.recipe.validation,
            validation_fraction=self.recipe.validation_fraction,
            seed=self.recipe.seed,
            max_tokens=tokens,
            max_target_tokens=self.recipe.max_target_tokens,
        )
        largest = max(self.data.train.largest_token, self.data.validation.largest_token)
        check_vocabulary(largest, getattr(self.config, "vocab_size", None), wanted.model)
        self.questions = Questions.of(self.data)
        self.recipe = dataclasses.replace(self.recipe, task=self.data.task)
        self.say(f"data: {self.data.described(self.recipe.max_tokens)}")

    def plan(self) -> None:
        """Choose what the recipe leaves open, and predict the peak of what was chosen."""
        if self.space.recipe.exists():
            self.recipe = self.space.adopt(self.recipe)
            if self.space.begun or self.space.done("plan", self._plan_inputs()):
                recipes.write(self.recipe, self.space.recipe)  # what was moved, and what may differ, is found there
                self.say(f"plan: {self.recipe.choice} (as before)")
                return
            # It was chosen for another model, data or hardware, and nothing is trained yet.
            self.recipe = dataclasses.replace(self.recipe, **{name: getattr(self.asked, name) for name in PLANNED})
            ledger.drop(self.space.ledger, {"base"})
        planned = runplan.RunPlan(
            backbone.as_fields(self.config), self.data, self.hardware, whole=self.until != "train"
        )
        self.recipe, found, why = planned.decide(self.recipe)
        write_json(self.space.plan, found)
        recipes.write(self.recipe, self.space.recipe)
        self.space.finish("plan", self._plan_inputs())
        self.say(
            f"plan: {self.recipe.choice}; {found['predicted_peak_bytes'] / 2**30:.2f} GiB of tensors predicted. {why}"
        )

    def _plan_inputs(self) -> dict[str, str]:
        """Fingerprints of what a plan is of."""
        hardware = fingerprint(self.hardware.title, self.hardware.memory_bytes)
        return {**self.space.sources(self.recipe), "the hardware": hardware}

    def train(self) -> None:
        """Train, unless the adapter of this very recipe and data is there."""
        forgotten = self.space.begun and self.space.forgotten
        inputs = self.space.training_inputs(self.recipe)
        if forgotten:
            self._check_anew()
            self.space.finish("training", inputs)
            if self.space.adapter.exists():  # which is only written when training is over
                self.space.finish("train", inputs)
        if self.space.done("train", inputs) and self.space.adapter.exists():
            if not whole.measured(self.space):
                self._measure_adapter("measured again, as ledger.json has no row of it")
            self.say("train: done before")
            return
        if bring.is_here(self.space):
            self._measure_adapter("trained elsewhere")
            self.space.finish("train", inputs)
            return
        if self.space.begun:
            self.space.check_unchanged(inputs)
        method = base.create(self._needs("method"), self.recipe.options)
        schedule.check(self.recipe, method)
        self.space.finish("training", inputs)
        if self.recipe.devices > 1:
            train_together(self.recipe, self.space.root, self.hardware.kind, self.say)
        else:
            self.fit(ALONE)
        self.space.finish("train", inputs)

    def fit(self, ranks: Ranks) -> None:
        """Train, or go on training, and record how good the backbone was and the adapter is."""
        method = base.create(self._needs("method"), self.recipe.options)
        self.device = "cpu" if ranks.sharded else self.device  # from where each device gets its part
        measured = self._has_measured_base()
        plain = self._load(self._needs("precision"), method.pack if measured else None)
        if not measured:
            shards.divide(plain, ranks)
            self._measure_base(plain, ranks)
        if not measured and (method.packs_its_own or ranks.sharded):
            del plain
            plain = self._load(self._needs("precision"), method.pack)
        torch.manual_seed(self.recipe.seed)
        there = precision.emulating(bf16=self.hardware.bf16, cuda=self.hardware.kind == "cuda")
        with there if ranks.sharded else contextlib.nullcontext():
            base.apply(method, plain)
        trainable = sum(parameter.numel() for parameter in adapter.trained(plain.model).values())
        first, *others = method.stages()
        does = "measured" if first.measures else "trained"
        where = f" in its first stage, {first.name}" if others else ""
        self.say(f"train: {trainable:,} parameters {does} by {method.name}{where}")
        start = self._start(trainable)
        with ample() if self._planned().get("ample") else contextlib.nullcontext():
            done = training.train(self.recipe, plain, method, self.data, self.space.root, start=start, ranks=ranks)
        if ranks.first:
            size, found = size_bytes(self.space.adapter), counts.training(done.stages)
            row = Row(artefact="adapter", metrics=done.metrics, bytes=size, counts=found, stages=done.stages)
            ledger.record(self.space.ledger, row)
            self.questions.note(self.space.answers, tuned=done.answers)
            runplan.note(self.space.plan, self.held, self.hardware.kind)
        self.say(f"train: {ledger.shown(done.metrics)}")
        del plain
        gc.collect()

    def _has_measured_base(self) -> bool:
        return ledger.find(self.space.ledger, "base") is not None

    def _measure_base(self, plain: Backbone, ranks: Ranks = ALONE) -> None:
        self.say("base: measuring the model as it is")
        found, answers = self._judged(plain.model, ranks)
        if ranks.first:
            self.questions.note(self.space.answers, base=answers)
            ledger.record(self.space.ledger, Row(artefact="base", metrics=found, kept=False))

    def _check_anew(self) -> None:
        """Hold what training left against recipe and model, where the state is gone by which they were known."""
        left = self.space.adapter if self.space.adapter.exists() else self.space.root / "checkpoints" / "best"
        if left.exists():
            method = base.create(self._needs("method"), self.recipe.options)
            adapter.check(left, method, self.recipe.model)
        if left == self.space.adapter:
            self._trained(self._needs("precision"))  # refuses tensors that are not the model's
        self.say(
            "train: state.json is gone. What was trained is held against recipe and model; whether the data is what it "
            "was trained on cannot be known"
        )

    def _measure_adapter(self, why: str) -> None:
        """Backbone and adapter, where training here did not, or what it measured is gone."""
        self._after_training()
        if self.data.labels and (note := bring.check_labels(self.space, self.data)):
            self.say(note)
        # First: an adapter that does not belong to the model is refused before work begins.
        found, answers = self._judged(self._trained(self._needs("precision")).model)
        if not self._has_measured_base():
            self._measure_base(self._load(self._needs("precision")))
        self.questions.note(self.space.answers, tuned=answers)
        row = Row(artefact="adapter", metrics=found, bytes=size_bytes(self.space.adapter))
        ledger.record(self.space.ledger, whole.with_counts(row, self.space))
        self.say(f"adapter: {why}; {ledger.shown(found)}")

    def merge(self) -> None:
        """Merge into a Hugging Face folder, if the method merges."""
        method = base.create(self._needs("method"), self.recipe.options)
        inputs = self._after_training()
        if self._is_done("merge", inputs, whole.merged):
            return
        self.say("merge: measuring it before and after")
        self.device = device_after("merge", self.hardware, self._planned(), self.say)
        if not method.merges:
            self._beside()
            self.space.finish("merge", inputs)
            self.say(f"merge: {method.name} stays beside its backbone; it is exported as it is")
            return
        try:
            rows = merging.merge(
                self._trained,
                self._needs("precision"),
                method,
                batches=validation_batches(self.data, self.recipe),
                tokenizer=self.data.tokenizer,
                out=self.space.merged,
                phases=self.held,
                ends=self.questions.ends,
            )
        except base.NotMergeable as error:
            self._beside()
            self.space.finish("merge", inputs)
            self.say(f"merge: {method.name} stays beside its backbone: {error.cause} It is exported as it is")
            return
        with watch.rise(self.held, "reloading", self.device):
            changed = self._changed(method, rows[-1])
        rows[-1] = dataclasses.replace(rows[-1], counts={**rows[-1].counts, **changed})
        ledger.record(self.space.ledger, *rows)
        runplan.note(self.space.plan, self.held, self.hardware.kind)
        self.space.finish("merge", inputs)
        for row in rows:
            self.say(f"merge: {row.artefact}: {ledger.shown(row.metrics)}{'' if row.kept else ' (not kept)'}")
        gc.collect()

    def export(self) -> None:
        """Export to ONNX, hold every variant against the model before it, and package the best for the device."""
        inputs = fingerprint(self._after_training(), sorted(self.recipe.variants))
        if self._is_done("export", inputs, whole.exported):
            return
        self.device = device_after("export", self.hardware, self._planned(), self.say)
        with watch.rise(self.held, "exporting", self.device):
            deploy.deploy(self._whole, self.recipe, self.data, self.space, self.say)
        runplan.note(self.space.plan, self.held, self.hardware.kind)
        self.space.finish("export", inputs)

    def _is_done(self, stage: str, inputs: str, wrong: Callable[[Workspace], str]) -> bool:
        """Whether a stage was done with these inputs, and what it left is whole; says so, or why it is done again."""
        if not self.space.done(stage, inputs):
            return False
        why = wrong(self.space)
        self.say(f"{stage}: done before" if not why else f"{stage}: once more. {why}")
        return not why

    def _whole(self) -> Any:
        """What is exported, in fp32: the merged model, or the backbone with the adapter in it."""
        if (merged := self.space.merged).exists():
            source, labels = backbone.resolve(str(merged)), self.data.labels or None
            return backbone.load(source, task=self.data.task, at="fp32", labels=labels).model
        model = self._trained(self._needs("precision")).model
        merging.to_full_precision(model)
        base.create(self._needs("method"), self.recipe.options).condense(model)
        return model

    def _beside(self) -> None:
        """What an adapter that does not merge changed, and how fast the backbone reads with it and without."""
        row = ledger.find(self.space.ledger, "adapter") or Row(artefact="adapter")
        at, batches = self._needs("precision"), validation_batches(self.data, self.recipe)
        found = merging.beside(lambda: self._trained(at).model, lambda: self._load(at).model, batches)
        ledger.record(self.space.ledger, dataclasses.replace(row, counts={**row.counts, **found}))

    def _changed(self, method: base.Method, merged: Row) -> dict[str, float]:
        """What training changed in the backbone that the kept merge was made of."""
        at = "fp32" if merged.artefact == "merged-original" else self._needs("precision")
        plain = self._load(at, method.pack) if method.packs_its_own else self._load(at)
        merging.to_full_precision(plain.model)
        found = counts.change(backbone.saved(self.space.merged, plain.model))
        return {"changed_parameters": found.parameters, "rank_of_change": found.rank}

    def _start(self, trainable: int) -> dict[str, Any]:
        return {
            "predicted_peak_bytes": self._planned().get("predicted_peak_bytes"),  # unknown where plan.json was deleted
            "trainable": trainable,
            "hardware": self.hardware.name,
            **{name: getattr(self.recipe, name) for name in ("method", "precision", "devices", "strategy")},
        }

    def _planned(self) -> dict[str, Any]:
        return runplan.read(self.space.plan)

    def _load(self, at: str, pack: backbone.Packing | None = None) -> Backbone:
        held = self.held if self.device == self.hardware.kind else {}  # what is loaded elsewhere was not planned
        with watch.rise(held, "loading" if at == self.recipe.precision else "reloading", self.device):
            return backbone.load(
                self.source,
                task=self.data.task,
                at=at,
                device=self.device,
                labels=self.data.labels or None,
                seed=self.recipe.seed,
                padding=pad_id(self.data.tokenizer),
                trust_remote_code=self.recipe.trust_remote_code,
                pack=pack,
            )

    def _trained(self, at: str) -> Backbone:
        """The backbone at a precision, with the trained adapter in it."""
        method = base.create(self._needs("method"), self.recipe.options)
        loaded = self._load(at, method.pack)
        base.complete(method, loaded)
        adapter.load(self.space.adapter, loaded.model)
        loaded.model.eval()
        return loaded

    def _after_training(self) -> str:
        method = base.create(self._needs("method"), self.recipe.options)
        inputs = self.space.training_inputs(self.recipe)  # reads data and model
        known = self.space.done("training", inputs)
        adapter.check(self.space.adapter, method, None if known else self.recipe.model)
        return fingerprint(self.space.adapter / adapter.TENSORS, inputs)

    def _judged(self, model: Any, ranks: Ranks = ALONE) -> tuple[dict[str, float], list[str]]:
        """Metrics of a model on the held-out examples, and its answers to some."""
        return evaluate(model, validation_batches(self.data, self.recipe), ranks), self.questions.answered(model)

    def _needs(self, name: str) -> str:
        value: str | None = getattr(self.recipe, name)
        if value is None:
            raise UsageError(
                f"There is no run in {self.space.root} yet.", f"Its {name} is not chosen.", "Run `edgepeft run`."
            )
        return value
