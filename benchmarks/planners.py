"""Planners side by side: edgepeft, fitcheck-llm and accelerate's estimate-memory, on runs that others measured.

Usage: ``pip install --no-deps fitcheck-llm==0.3.1``, then ``python benchmarks/planners.py``: ``results/planners.md``.
The shared rows are those of ``rows.csv`` that fitcheck's authors measured on a Tesla T4 and publish with their package.
Its constants were calibrated on some of them; edgepeft traces each run anew, with the harness that it was run by.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from unittest import mock

import hf
import rows
from edgepeft import catalog
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_text
from edgepeft.methods import base
from rows import Row

RESULTS = Path(__file__).resolve().parent / "results" / "planners.md"
MiB = 2**20
CONTEXT_BYTES = 141 * MiB  # of CUDA on this card, which fitcheck's total includes and its authors measured in every run


@dataclass
class Answers:
    """What one planner said: predicted and measured bytes of each row, refusals, and seconds of each answer."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    allocated: list[float] = field(default_factory=list)  # errors of allocated bytes alone, which only edgepeft tells

    def errors(self) -> list[float]:
        return [predicted / measured - 1 for predicted, measured in self.pairs]


def main() -> None:
    try:
        import_module("fitcheck")
    except ModuleNotFoundError as error:
        raise UsageError(
            "fitcheck-llm is not installed.", "It is a peer, not a dependency.", "pip install --no-deps fitcheck-llm"
        ) from error
    shared = [row for row in rows.read() if row.harness == "t4"]
    for row in shared:
        _parameters(row.setup["model"])  # what the hub knows is no part of an answer's time
    found = {
        "edgepeft": _edgepeft(shared),
        "fitcheck-llm": _each(shared, _fitcheck),
        "accelerate estimate-memory": _each(shared, _accelerate),
    }
    text = report(found, len(shared), coverage())
    write_text(RESULTS, text)
    print(text)


def _edgepeft(shared: list[Row]) -> Answers:
    """All rows from the cache of traces where it has them; three are traced again, to time it."""
    answers = Answers()
    for row, answer in zip(shared, rows.traced([(row.harness, row.setup, None) for row in shared]), strict=True):
        if "error" in answer:
            answers.refused.append(f"{row.label}: {answer['error']}")
        else:
            assert row.reserved_bytes is not None
            answers.pairs.append((answer["reserved_bytes"] + CONTEXT_BYTES, row.reserved_bytes + CONTEXT_BYTES))
            answers.allocated += rows.errors([(answer["allocated_bytes"], row.allocated_bytes)])
    script = str(Path(rows.__file__).with_name("rebuilt.py"))
    for row in shared[:3]:
        argument = json.dumps({"harness": row.harness, "layers": None, **row.setup})
        started = time.perf_counter()
        subprocess.run([sys.executable, script, argument], check=True, capture_output=True)
        answers.seconds.append(time.perf_counter() - started)
    return answers


def _each(shared: list[Row], estimate: Callable[[Row], float]) -> Answers:
    answers = Answers()
    for row in shared:
        started = time.perf_counter()
        try:
            predicted = estimate(row)
        except (ValueError, RuntimeError) as error:
            answers.refused.append(f"{row.label}: {str(error).split('. ')[0]}")
            continue
        answers.seconds.append(time.perf_counter() - started)
        assert row.reserved_bytes is not None
        answers.pairs.append((predicted, row.reserved_bytes + CONTEXT_BYTES))
    return answers


def _fitcheck(row: Row) -> float:
    """Its total, which is meant to be what the process takes of the card."""
    import fitcheck

    with _offline(row.setup["model"]):
        config = fitcheck.fetch_model_config(row.setup["model"])
    training = fitcheck.TrainingConfig(
        precision="fp16",
        quantization=row.setup["quant"],
        batch_size=row.setup["microbatch"],
        seq_len=row.setup["tokens"],
        lora_rank=row.setup["rank"],
        grad_checkpoint=True,
        flash_attn=row.setup["attention"] == "sdpa",
    )
    return float(fitcheck.estimate(config, training, fitcheck.get_gpu("t4")).total_mib) * MiB


@contextlib.contextmanager
def _offline(model: str) -> Iterator[None]:
    """What the hub would tell it: config.json and the number of parameters."""
    entry = hf.config(model).to_dict()
    parameters = _parameters(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(entry, default=str), encoding="utf-8")
        with (
            mock.patch("fitcheck.config_parser.hf_hub_download", lambda **_: str(path)),
            mock.patch("fitcheck.config_parser._reported_param_count", lambda *_: parameters),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield


@functools.cache
def _parameters(model: str) -> int:
    """The number the hub shows: tied tensors once."""
    empty = _empty(model)
    empty.tie_weights()
    return sum(parameter.numel() for parameter in empty.parameters())


def _accelerate(row: Row) -> float:
    """What its table calls "Training using Adam": all parameters are trained, batch and sequence do not count."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    total, _ = calculate_maximum_sizes(_empty(row.setup["model"]))
    return float(estimate_training_usage(total, "float16")["step"])


def _empty(model: str) -> Any:
    """The model that ``accelerate estimate-memory`` makes: without weights, by its configuration's class."""
    import transformers
    from accelerate import init_empty_weights

    config = hf.config(model)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    if config.model_type in ("bert", "roberta", "distilbert"):
        kind = "AutoModel"
    with init_empty_weights():
        return getattr(transformers, kind).from_config(config)


def coverage() -> dict[str, int]:
    """How many of the catalogue's models each can read."""
    import fitcheck
    from accelerate.utils import calculate_maximum_sizes

    read = {"edgepeft": len(catalog.names()), "fitcheck-llm": 0, "accelerate estimate-memory": 0}
    for name in catalog.names():
        with contextlib.suppress(ValueError, RuntimeError), _offline(name):
            fitcheck.fetch_model_config(name)
            read["fitcheck-llm"] += 1
        with contextlib.suppress(ValueError, RuntimeError):
            calculate_maximum_sizes(_empty(name))
            read["accelerate estimate-memory"] += 1
    return read


def report(found: dict[str, Answers], shared: int, read: dict[str, int]) -> str:
    """Markdown."""
    asks = {
        "edgepeft": f"{len(base.names())} methods, fp32, bf16, int8, NF4, microbatch, sequence, checkpointing, phases",
        "fitcheck-llm": "LoRA, QLoRA, full; fp32, fp16, bf16, int8, NF4; microbatch, sequence, checkpointing",
        "accelerate estimate-memory": "full tuning with Adam; neither microbatch nor sequence",
    }
    lines = [
        "# Planners side by side",
        "",
        f"{shared} runs on a Tesla T4, published with fitcheck-llm {metadata.version('fitcheck-llm')} "
        f"(part of them calibrated its constants); accelerate {metadata.version('accelerate')}. Compared is what the "
        "process takes of the card: reserved memory and 141 MiB of CUDA context. accelerate answers another question, "
        "full tuning, because it knows no other; its error says what relying on it for LoRA costs.",
        "",
        "| planner | rows answered | median error | largest over | largest under | seconds an answer | models read |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, answers in found.items():
        errors = answers.errors()
        median = statistics.median(map(abs, errors))
        lines.append(
            f"| {name} | {len(errors)} of {shared} | {median:.1%} | {max(errors):+.1%} | {min(errors):+.1%} "
            f"| {statistics.median(answers.seconds):.3g} | {read[name]} of {len(catalog.names())} |"
        )
    lines += ["", "| planner | what can be asked |", "|---|---|", *(f"| {k} | {v} |" for k, v in asks.items()), ""]
    allocated = found["edgepeft"].allocated
    lines.append(
        f"Of allocated bytes, before the allocator's reserve, edgepeft's median error is "
        f"{statistics.median(map(abs, allocated)):.2%}, its range {min(allocated):+.2%} to {max(allocated):+.2%}."
    )
    lines.append(
        "edgepeft's seconds are of a fresh trace at full depth with three steps, in a new process, imports included; "
        "`edgepeft plan` traces shallow models and keeps what it found."
    )
    refused = [f"- {name}: {text}" for name, answers in found.items() for text in answers.refused]
    return "\n".join([*lines, "", *(["Refused:", "", *refused] if refused else [])]).rstrip() + "\n"


if __name__ == "__main__":
    try:
        main()
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
