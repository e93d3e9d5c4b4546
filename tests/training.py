"""Training runs on tiny real models, in this process or in one that kills itself half-way."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import tiny_tokenizers
import torch
from safetensors.torch import save_file
from torch import nn

from edgepeft import backbone, data, events, ranks, recipe, shards
from edgepeft import train as training
from edgepeft.adapter import TENSORS
from edgepeft.backbone import Backbone
from edgepeft.data import Data
from edgepeft.methods import base
from edgepeft.recipe import Recipe

# Children are forked from a server that has imported everything, not from this process with its threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["training", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"])

ROWS = 22
WORDS = "the quick brown fox jumps over a lazy dog and runs on to the small board".split()


@cache
def source(task: str) -> Path:
    """A folder with a model, its tokenizer and data for it: ``model/`` and ``data.jsonl``. Read only."""
    family = {"causal-lm": "llama", "classification": "bert", "seq2seq": "t5"}[task]
    folder = tiny.folder(family).parent / f"{tiny.folder(family).name}-run"
    tokens = {
        "causal-lm": tiny_tokenizers.byte_level,
        "classification": tiny_tokenizers.word_piece,
        "seq2seq": tiny_tokenizers.unigram,
    }[task]()
    changes = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id}
    if task == "classification":
        changes |= {"hidden_dropout_prob": 0.1}  # so that the random state matters without LoRA's dropout too
    tiny.model(family, **changes).save_pretrained(folder / "model")
    tokens.save_pretrained(folder / "model")
    rows = []
    for number in range(ROWS):
        text = " ".join(WORDS[(number * 5 + offset) % len(WORDS)] for offset in range(3 + number % 7))
        rows.append(
            {
                "causal-lm": {"prompt": text, "completion": " " + text.upper()[: 4 + number % 5]},
                "classification": {"text": text, "label": ("short", "long", "longer")[number % 7 // 3]},
                "seq2seq": {"input": text, "target": text[::-1]},
            }[task]
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tiny.remove_at_exit(folder)
    return folder


def written(task: str, **changes: Any) -> Recipe:
    """A recipe of ten updates in two epochs, evaluated four times."""
    folder = source(task)
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "task": task,
        "max_tokens": 32,
        "method": "lora",
        "options": {"dropout": 0.2},
        "precision": "fp32",
        "microbatch": 2,
        "global_batch": 4,
        "epochs": 2.0,
        "lr": 5e-3,
        "weight_decay": 0.1,
    }
    return recipe.create(values | changes)


def prepared(chosen: Recipe, cache_folder: Path) -> tuple[Backbone, base.Method, Data]:
    """What ``train`` needs."""
    place = backbone.resolve(chosen.model)
    tokens = backbone.tokenizer(place)
    assert chosen.task and chosen.method and chosen.precision and chosen.max_tokens
    read = data.load(chosen.data, tokenizer=tokens, cache=cache_folder, task=chosen.task, max_tokens=chosen.max_tokens)
    labels = read.labels if chosen.task == "classification" else None
    made = backbone.load(place, task=chosen.task, at=chosen.precision, labels=labels, seed=chosen.seed)
    method = base.create(chosen.method, chosen.options)
    base.apply(method, made)
    return made, method, read


def run(chosen: Recipe, out: Path, on_forward: Callable[[int], None] | None = None) -> training.Trained:
    """Train, or go on training, in ``out``; ``on_forward`` hears how many forward passes there were before each."""
    torch.set_num_threads(1)  # in this process and in those that die: the number decides the last bits of sums
    made, method, read = prepared(chosen, out.parent / "cache")
    if on_forward is not None:
        _hear(made, on_forward)
    return training.train(chosen, made, method, read, out, start={})


def _hear(made: Backbone, on_forward: Callable[[int], None]) -> None:
    """Number the forward passes of training: an evaluation's are as many as its answers have tokens."""
    count = iter(range(10**9))

    def heard(module: nn.Module, args: Any) -> None:
        if module.training:
            on_forward(next(count))

    made.model.register_forward_pre_hook(heard)


def together(chosen: Recipe, out: Path, count: int = 2, on_forward: Callable[[int], None] | None = None) -> list[int]:
    """Train in ``count`` processes over gloo and give their exit codes; ``on_forward`` is heard in the last of them.

    What each holds in the end is in ``rank-N.safetensors`` beside ``out``.
    """
    prepared(chosen, out.parent / "cache")  # so that the data is there when all look for it
    meeting = Path(tempfile.mkdtemp(prefix="edgepeft-meeting-"))
    tiny.remove_at_exit(meeting)
    processes = [
        SERVER.Process(target=_rank, args=(chosen, out, rank, count, meeting / "file", on_forward))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode or 0 for process in processes]


def _rank(
    chosen: Recipe, out: Path, rank: int, count: int, meeting: Path, on_forward: Callable[[int], None] | None
) -> None:
    torch.set_num_threads(1)
    with ranks.joined(rank, count, "cpu", meeting, sharded=chosen.strategy == "fsdp") as ours:
        made, method, read = prepared(chosen, out.parent / "cache")
        if on_forward is not None and rank == count - 1:
            _hear(made, on_forward)
        training.train(chosen, made, method, read, out, start={}, ranks=ours)
        held = {name: shards.whole(tensor.detach()).clone() for name, tensor in base.state(made.model).items()}
    save_file(held, out.parent / f"rank-{rank}.safetensors")


def run_until_killed(chosen: Recipe, out: Path, passes: int, checkpoint_seconds: int | None = None) -> None:
    """Train, and die without warning in the forward pass after ``passes``. For a process of its own."""
    if checkpoint_seconds is not None:
        training.CHECKPOINT_SECONDS = checkpoint_seconds

    run(chosen, out, functools.partial(die_at, passes))


def die_at(passes: int, number: int) -> None:
    """Die without warning in the forward pass after ``passes``."""
    if number == passes:
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed_while_writing(chosen: Recipe, out: Path, renames: int) -> None:
    """Train, and die without warning, after ``renames``, just before the next would make a file or folder visible."""
    rename, count = os.replace, iter(range(10**9))

    def dying(source: Any, target: Any) -> None:
        if next(count) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = dying  # type: ignore[assignment]
    run(chosen, out)


def dies(what: Callable[..., None], *arguments: Any) -> None:
    """Run ``what`` in a process that kills itself."""
    process = SERVER.Process(target=what, args=arguments)
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL


def result(out: Path) -> bytes:
    """The adapter's file."""
    return (out / "adapter" / TENSORS).read_bytes()


def log(out: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind."""
    return [event for event in events.read(out / "events.jsonl") if event["event"] == kind]
