"""One process: one method tuned at one learning rate and scored, or timed beside full tuning."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import job
from edgepeft import backbone, data, heap, recipe
from edgepeft import train as training
from edgepeft.backbone import Backbone
from edgepeft.data import Data
from edgepeft.data.tokens import pad_id
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_json
from edgepeft.methods import base
from edgepeft.methods.base import Method
from edgepeft.step import Batch, TrainingStep, answer_states, inputs, unpadded
from tuning import BENCHES, DEV, STATE, Bench, Row, texts

WARM_UP, ROUNDS = 1, 3
SCORE_BATCH = 32

if str(job.ROOT) not in sys.path:
    sys.path.insert(0, str(job.ROOT))  # for methods that are in benchmarks/
for _name in base.names():  # a server forks from a process that has them, so that all runs are of the same code
    base.find(_name)


def alone(what: Callable[..., dict[str, Any]], out: Path, *arguments: Any) -> None:
    """Write what ``what`` finds, or why it found nothing, into ``out``. For a process of its own."""
    torch.set_num_threads(1)
    log = os.open(STATE / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"--- {out}", flush=True)
    found: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    try:
        found |= what(*arguments)
    except UsageError as error:
        found["refused"] = str(error.fact)
    except EdgePeftError as error:
        found["failed"] = str(error.fact)
    except Exception as error:  # a defect of a method is a result, and the other runs go on
        traceback.print_exc()
        found["crashed"] = f"{type(error).__name__}: {error}"[:300]
    write_json(out, found)


def tune(bench_name: str, row: Row, rate: float, seed: int) -> dict[str, Any]:
    """Train, then score on examples that chose nothing."""
    bench = BENCHES[bench_name]
    with tempfile.TemporaryDirectory(prefix="edgepeft-methods-") as folder:
        made, method, read, done, seconds = _trained(bench, row, rate, seed, Path(folder), bench.data())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        stages = [event for event in _events(Path(folder)) if event["event"] == "end"][-1]["stages"]
    return {
        "options": {name: value for name, value in _plain(method) if name not in row.options},
        "dev": done.metrics,
        **score(bench, made.model),
        "trained": stages[-1]["trained"],
        "trained_most": done.trained_parameters,
        "peak_tensor_bytes": done.measured_peak_bytes,
        "peak_rss_bytes": peak,
        "seconds": seconds,
        "stages": stages,
    }


def untuned(bench_name: str, seed: int) -> dict[str, Any]:
    """The score before any training; of a classifier, that of a random head."""
    bench = BENCHES[bench_name]
    plain = _load(bench, bench.precision, seed)
    return {**score(bench, plain.model), "parameters": sum(p.numel() for p in plain.model.parameters())}


def prompt(bench_name: str, other: str) -> dict[str, Any]:
    """A prompt for another task on the same texts, which SPoT or IPT starts from."""
    bench = BENCHES[bench_name]
    row = Row("prompt_tuning", bench.precision)
    with tempfile.TemporaryDirectory(prefix="edgepeft-methods-") as folder:
        rate = 3 * bench.scale * base.find("prompt_tuning").learning_rate
        *_, done, _ = _trained(bench, row, rate, 0, Path(folder), bench.data(other))
        home = bench.folder / "prompts" / other
        shutil.copytree(done.adapter, home, dirs_exist_ok=True)
    return {"dev": done.metrics}


def speed(bench_name: str, row: Row) -> dict[str, Any]:
    """Processor seconds of an update and of reading a batch, in turn with full tuning's on the same batch.

    One thread's processor seconds hardly feel how busy a machine is; what is left of it meets both sides.
    """
    bench = BENCHES[bench_name]
    read = _data(bench, bench.data())
    batch = unpadded(read.train.collate(list(range(bench.batch))))
    full = Row("full", bench.precision)
    sides = [_step(bench, full), _step(bench, row)]
    with heap.ample():
        train = _turns([partial(_update, step, batch) for step in sides])
    del sides
    gc.collect()
    readers = [_deployed(bench, full), _deployed(bench, row)]
    infer = _turns([partial(_read, bench, model, batch) for model in readers])
    return {"train": train, "infer": infer}


def pretrain() -> dict[str, Any]:
    """The T5 of ``tools/tiny_t5.py`` trained to say whether there is a comma in a text, by *yes* or *no*."""
    bench, updates, batch = BENCHES["t5"], 500, 32
    with tempfile.TemporaryDirectory(prefix="edgepeft-methods-") as name:
        folder = Path(name)
        parts = {"train": texts("train")[: bench.train.start], "validation": texts("validation")[:DEV]}
        for split, rows in parts.items():
            examples = [{"input": f"comma: {text}", "target": "yes" if "," in text else "no"} for text, _ in rows]
            lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        wanted = recipe.create(
            {
                "model": str(job.ROOT / "models" / "t5-tiny"),
                "data": str(folder),
                "task": "seq2seq",
                "max_tokens": bench.tokens,
                "method": "full",
                "precision": "fp32",
                "microbatch": batch,
                "global_batch": batch,
                "epochs": 1000.0,
                "max_steps": updates,
                "lr": 1e-3,
                "weight_decay": 0.01,
                "evaluations": 5,
            }
        )
        place = backbone.resolve(wanted.model)
        tokens = backbone.tokenizer(place)
        read = data.load(wanted.data, tokenizer=tokens, cache=folder / "cache", task="seq2seq", max_tokens=bench.tokens)
        made = backbone.load(place, task="seq2seq", at="fp32")
        method = base.create("full")
        base.apply(method, made)
        done = training.train(wanted, made, method, read, folder / "out", start={})
        method.merge(made.model)
        backbone.save(made.model, bench.model, tokens)
    return {"dev": done.metrics, "updates": updates, "batch": batch, "examples": len(parts["train"])}


@torch.no_grad()
def score(bench: Bench, model: nn.Module) -> dict[str, float]:
    """``score``: the share of examples whose own class gets more than the others; ``loss``: nats a target.

    Where a class is a word, its first token is compared with the first tokens of the other words, as a choice among
    answers; the untuned model is thus not blamed for an answer in a form of its own.
    """
    read = _data(bench, bench.data(), validation="score.jsonl")
    held_out, right, loss, targets = read.validation, 0, 0.0, 0
    words = _first_tokens(held_out)
    model.eval()
    for first in range(0, len(held_out), SCORE_BATCH):
        batch = held_out.collate(list(range(first, min(first + SCORE_BATCH, len(held_out)))))
        if bench.task == "classification":
            logits, wanted = model(**inputs(batch)).logits.float(), batch["labels"]
            right += int((logits.argmax(-1) == wanted).sum())
        else:
            wanted = batch["target_ids"]
            made: Any = model
            logits = made.get_output_embeddings()(answer_states(model, batch)).float()
            tokens = batch.get("decoder_input_ids", batch["input_ids"]).shape[1]
            rows = (batch["target_positions"] // tokens).tolist()
            begins = [at for at, row in enumerate(rows) if at == 0 or rows[at - 1] != row]
            choice = torch.tensor(words)[logits[begins][:, words].argmax(-1)]
            right += int((choice == wanted[begins]).sum())
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        targets += wanted.numel()
    return {"score": right / len(held_out), "loss": loss / targets}


def _first_tokens(split: data.Split) -> list[int]:
    if split.task == "classification":
        return []
    found = sorted({example.target_ids[0] for example in split.examples(range(len(split)))})
    assert len(found) == 2, f"the classes' words begin with the tokens {found}"
    return found


def _trained(
    bench: Bench, row: Row, rate: float, seed: int, folder: Path, source: Path
) -> tuple[Backbone, Method, Data, training.Trained, float]:
    read = _data(bench, source)
    torch.manual_seed(seed)
    made, method = _applied(bench, row, seed, read.labels)
    wanted = recipe.create(
        {
            "model": str(bench.model),
            "data": str(source),
            "task": bench.task,
            "max_tokens": bench.tokens,
            "method": row.method,
            "options": dict(_plain(method)),
            "precision": row.precision,
            "microbatch": bench.batch,
            "global_batch": bench.batch,
            "max_steps": bench.updates,
            "lr": rate,
            "evaluations": 1,
            "seed": seed,
        }
    )
    began = time.perf_counter()
    with heap.ample():
        done = training.train(wanted, made, method, read, folder, start={})
    return made, method, read, done, time.perf_counter() - began


def _applied(bench: Bench, row: Row, seed: int, labels: tuple[str, ...] = ()) -> tuple[Backbone, Method]:
    """The method with the row's options in a fresh backbone, or with those for narrow models if it refuses them."""
    for options in (row.options, {**base.find(row.method).narrow, **row.options}):
        method = base.create(row.method, options)
        made = _load(bench, row.precision, seed, labels, method)
        torch.manual_seed(seed)
        try:
            base.apply(method, made)
        except UsageError:
            if not base.find(row.method).narrow or options is not row.options:
                raise
        else:
            return made, method
    raise AssertionError


def _load(bench: Bench, at: str, seed: int, labels: tuple[str, ...] = (), method: Method | None = None) -> Backbone:
    place = backbone.resolve(str(bench.model))
    names = labels or ("negative", "positive") if bench.task == "classification" else None
    padding = pad_id(backbone.tokenizer(place))
    pack = None if method is None else method.pack
    return backbone.load(place, task=bench.task, at=at, labels=names, seed=seed, padding=padding, pack=pack)


def _data(bench: Bench, source: Path, validation: str | None = None) -> Data:
    return data.load(
        str(source),
        tokenizer=backbone.tokenizer(backbone.resolve(str(bench.model))),
        cache=bench.folder / "tokens",
        task=bench.task,
        validation=str(source / validation) if validation else None,
        max_tokens=bench.tokens,
    )


def _step(bench: Bench, row: Row) -> TrainingStep:
    """The training step of a method's last stage that trains."""
    made, method = _applied(bench, row, 0)
    read = _data(bench, bench.data())
    stages = method.stages()
    last = max(number for number, stage in enumerate(stages) if stage.updates is None)
    for number, stage in enumerate(stages[: last + 1]):
        if number:
            base.begin(method, made, number)
        made.model.train()
        step = TrainingStep(
            made.model,
            stage.optimizer(made.model, 1e-5, 0.0),
            clip_norm=1.0 if not (stage.measures or method.updates_in_backward) else None,
            penalty=method.penalty,
            after_update=method.after_update,
        )
        if number < last:  # what the next stage chooses by
            _update(step, unpadded(read.train.collate([0])))
    return step


def _deployed(bench: Bench, row: Row) -> nn.Module:
    """What a trained adapter is loaded into, not merged."""
    _, method = _applied(bench, row, 0)
    made = _load(bench, row.precision, 0, method=method)
    base.complete(method, made)
    made.model.eval()
    if not method.merges and row.precision == "fp32":
        method.condense(made.model)
    return made.model


def _update(step: TrainingStep, batch: Batch) -> None:
    step.backward([batch], 1e-5)
    step.update(0.9)


@torch.no_grad()
def _read(bench: Bench, model: nn.Module, batch: Batch) -> None:
    if bench.task == "classification":
        model(**inputs(batch))
    else:
        answer_states(model, batch)


def _turns(sides: list[Callable[[], None]]) -> dict[str, Any]:
    """Processor seconds of full tuning and of the method: medians of rounds after a warm-up."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(WARM_UP + ROUNDS):
        for side, seconds in zip(sides, found, strict=True):
            began = time.process_time()
            side()
            if number >= WARM_UP:
                seconds.append(time.process_time() - began)
    full, method = map(statistics.median, found)
    return {"full_seconds": full, "method_seconds": method, "relative": full / method, "all": found}


def _plain(method: Method) -> list[tuple[str, Any]]:
    """The options that are not the defaults."""
    default = {field: value for field, value in vars(type(method)).items() if field in vars(method)}
    return [(name, value) for name, value in vars(method).items() if value != default.get(name)]


def _events(folder: Path) -> list[dict[str, Any]]:
    from edgepeft import events

    return list(events.read(folder / "events.jsonl"))
