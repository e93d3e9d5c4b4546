"""From a trained model to a device folder: export, quantise, hold each variant to the parity gate, package the best."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepeft import ledger
from edgepeft.answers import TOKENS, Questions, greedy, start
from edgepeft.backbone import positions
from edgepeft.data import Data
from edgepeft.data.encode import closing
from edgepeft.errors import EdgePeftError
from edgepeft.evaluate import evaluate, sample_logits, validation_batches
from edgepeft.export import genai, onnx, parity, quantize
from edgepeft.export.package import package
from edgepeft.files import size_bytes
from edgepeft.ledger import Row
from edgepeft.methods import base
from edgepeft.recipe import VARIANTS, Recipe
from edgepeft.runtime.sessions import open_graphs
from edgepeft.step import Batch
from edgepeft.workspace import Workspace

PROMPTS = 8  # answered and compared
SLOWER = 1.2  # times as slow as fp32 is clearly slower; less may be chance
UNBOUNDED = 4096  # tokens a device accepts for a model whose positions have no end (T5)


def deploy(
    load: Callable[[], Any],
    recipe: Recipe,
    data: Data,
    space: Workspace,
    say: Callable[[str], None],
) -> Path:
    """Export a model and leave the best variant that keeps the fine-tune in the device folder.

    Args:
        load: loads the model, in fp32. It is let go of when its graph is known to compute what it does: variants are
            held against that graph, and made without it in memory.

    Raises:
        EdgePeftError: the exported graph does not compute what the model does, or every variant lost the fine-tune.
    """
    gate = _Gate(load().eval(), recipe, data, space)
    row = _fp32(data, space, gate, say)
    gate.model = None
    gc.collect()  # what a method has put on a model refers to it in a circle
    ledger.record(space.ledger, row)
    say(f"export: onnx-fp32: {_described(row)}")
    if not row.kept:
        raise EdgePeftError("The exported ONNX graph does not compute what the trained model does.", row.note, _REPORT)
    rows = {"fp32": row}
    for variant in (name for name in recipe.variants if name != "fp32"):
        quantize.quantize(space.onnx / "fp32", variant, data.task, space.onnx / variant)
        rows[variant] = gate.measure(variant)
        ledger.record(space.ledger, rows[variant])
        say(f"export: onnx-{variant}: {_described(rows[variant])}")
    best = choose(rows)
    ledger.drop(space.ledger, {f"onnx-{name}" for name in VARIANTS} - {row.artefact for row in rows.values()})
    ledger.record(space.ledger, *(_marked(row, rows["fp32"], best) for row in rows.values()))
    gate.questions.note(space.answers, device=gate.answers.get(best, []))
    package(
        graphs=space.onnx / best,
        tokenizer=data.tokenizer,
        task=data.task,
        labels=data.labels or None,
        template=data.template,
        eos_token_ids=gate.stops,
        stop=gate.questions.stop,
        closing_token_ids=closing(data.tokenizer) if data.task == "causal-lm" else [],
        decoder_start_token_id=gate.start,
        max_tokens=gate.longest,
        name=recipe.model,
        method=recipe.method or "",
        variant=best,
        metrics=rows[best].metrics,
        target=space.device,
    )
    alone = ". No smaller one keeps the fine-tune and is as fast" if best == "fp32" and len(rows) > 1 else ""
    say(f"device: {space.device} holds the {best} graph, {size_bytes(space.device) / 2**20:.0f} MiB{alone}")
    return space.device


def _fp32(data: Data, space: Workspace, gate: _Gate, say: Callable[[str], None]) -> Row:
    """The fp32 graph: from ONNX Runtime GenAI's builder where it can be had and passes the gate, else traced here."""
    if data.task == "causal-lm" and space.merged.exists() and genai.buildable(space.merged):
        say("export: building the fp32 graph with ONNX Runtime GenAI")
        try:
            genai.build(space.merged, space.onnx / "fp32")
            row = gate.measure("fp32")
            if row.kept:
                return row
            say(f"export: that graph is refused: {row.note}")
        except EdgePeftError as error:
            say(f"export: {error.fact} {error.cause}")
    say("export: tracing the fp32 graph")
    onnx.export(gate.model, data.task, space.onnx / "fp32")
    return gate.measure("fp32")


def choose(rows: dict[str, Row]) -> str:
    """The smallest variant that kept the fine-tune and is not clearly slower than fp32 on this machine."""
    fitting = [name for name, row in rows.items() if row.kept and not slower(row, rows["fp32"])]
    return min(fitting, key=lambda name: rows[name].bytes or 0)


def slower(row: Row, fp32: Row) -> str:
    """By how much a variant is slower than fp32, in words; nothing where that may be chance."""
    if row.tokens_per_second is not None and fp32.tokens_per_second is not None:
        clearly = row.tokens_per_second * SLOWER < fp32.tokens_per_second
        said = f"{row.tokens_per_second:.1f} tokens/s against {fp32.tokens_per_second:.1f}"
    else:
        clearly = (row.latency_ms or 0.0) > SLOWER * (fp32.latency_ms or 0.0)
        said = f"{row.latency_ms or 0.0:.1f} ms against {fp32.latency_ms or 0.0:.1f}"
    return said if clearly else ""


_REPORT = "The adapter and the merged model are untouched. Please report it with the recipe."


class _Gate:
    """Measures a variant against the artefact before it, on the run's validation examples."""

    def __init__(self, model: Any, recipe: Recipe, data: Data, space: Workspace) -> None:
        self.model = model  # until its graph is made
        self.config, self.data, self.space = model.config, data, space
        # Texts are compared one by one: all logits of a training's microbatch may need more memory than the model.
        size = recipe.microbatch if data.task == "classification" else 1
        self.torch_batches: list[Batch] = validation_batches(data, replace(recipe, microbatch=size))
        self.batches = [{name: value.numpy() for name, value in batch.items()} for batch in self.torch_batches]
        self.start: int | None = start(model.config) if data.task == "seq2seq" else None
        self.questions = Questions.of(data, PROMPTS)
        self.stops = self.questions.ending(model)
        self.answers: dict[str, list[str]] = {}
        self.longest = _longest(self.config, recipe)
        self.tuned = Row(artefact="tuned", metrics=evaluate(model, self.torch_batches))
        self.expected = [greedy(model, *asked, self.stops) for asked in self._asked()]

    def measure(self, variant: str) -> Row:
        graphs = open_graphs(self.space.onnx / variant, self.data.task)
        if variant == "fp32":
            found = parity.compare(graphs, self.batches, self._torch_logits)
        else:
            before = open_graphs(self.space.onnx / "fp32", self.data.task)
            found = parity.compare(graphs, self.batches, lambda i: parity.target_logits(before, self.batches[i]))
        if not np.isfinite(list(found.metrics.values())).all():  # it cannot generate, and JSON has no NaN
            size = size_bytes(self.space.onnx / variant)
            return Row(artefact=f"onnx-{variant}", bytes=size, kept=False, note="Its outputs are not numbers.")
        tokens = [parity.generate(graphs, *asked, self.stops, self.start) for asked in self._asked()]
        self.answers[variant] = self.questions.texts(tokens)
        latency, speed = parity.speed(graphs, self.data.task, self.start)
        row = Row(
            artefact=f"onnx-{variant}",
            metrics=found.metrics,
            bytes=size_bytes(self.space.onnx / variant),
            latency_ms=latency,
            tokens_per_second=speed,
            deviation=found.deviation,
            same_tokens=parity.same_tokens(self.expected, tokens) if tokens else None,
        )
        base = ledger.find(self.space.ledger, "base")
        note = parity.same_function(row) if variant == "fp32" else ""
        examples = sum(len(batch["input_ids"]) for batch in self.batches)
        note = note or parity.keeps_fine_tune(self.data.task, row, self.tuned, base, examples)
        return Row(**{**vars(row), "kept": not note, "note": note})

    def _asked(self) -> Iterator[tuple[list[int], int]]:
        """Prompts, and how many tokens after each are compared: more than a short answer has, as a cache errs late."""
        for example in self.questions.examples:
            yield example.prompt_ids, min(TOKENS, self.longest - (len(example.prompt_ids) if self.start is None else 0))

    @torch.no_grad()
    def _torch_logits(self, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return sample_logits(self.model, [self.torch_batches[index]])[0].numpy()


def _longest(configuration: Any, recipe: Recipe) -> int:
    """How many tokens a device accepts: the model's positions without those of the method's own tokens."""
    most = positions(configuration)
    if most is None:
        return UNBOUNDED
    assert recipe.method is not None
    return most - base.create(recipe.method, recipe.options).positions(configuration)


def _marked(row: Row, fp32: Row, best: str) -> Row:
    late, shipped = slower(row, fp32), row.artefact == f"onnx-{best}"
    why = f"it is slower here than fp32, {late}" if late else f"{best} is smaller and keeps the fine-tune"
    note = row.note or ("On the device." if shipped else f"Not on the device: {why}.")
    return Row(**{**vars(row), "kept": shipped, "note": note})


def _described(row: Row) -> str:
    parts = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.metrics.items()]
    parts.append(f"{(row.bytes or 0) / 2**20:.0f} MiB")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:.1f} tokens/s")
    elif row.latency_ms is not None:
        parts.append(f"{row.latency_ms:.1f} ms")
    return ", ".join(parts) + (f". Refused: {row.note}" if row.note else "")
