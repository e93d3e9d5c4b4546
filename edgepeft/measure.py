"""Run two real steps of a configuration and compare what they hold with what was predicted: ``edgepeft measure``.

The weights are random: memory and time do not depend on their values, and nothing is downloaded. Rows can be added to
the table that predictions are tested against.
"""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from edgepeft import backbone, largest, precision, probe, resident, roofline, tasks
from edgepeft.candidate import needed_bytes
from edgepeft.catalog.fields import positions_left
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_text
from edgepeft.hardware import Hardware
from edgepeft.methods import base
from edgepeft.placements import eight_bit
from edgepeft.step import TrainingStep, recompute_activations
from edgepeft.surface import ADAMW, EIGHT_BIT, PASSING, Configuration
from edgepeft.trace import Peak, Tracker

GiB = 2**30
COLUMNS = (
    *("source", "model", "method", "config", "dtype", "quant", "optimizer", "microbatch", "seq_len", "target_len"),
    *("grad_ckpt", "gpu", "peak_mem_gb", "peak_definition", "throughput", "notes"),
    *("predicted_bytes", "allocated_bytes", "reserved_bytes", "process_bytes", "seconds", "predicted_seconds"),
)
LIBRARIES = ("torch", "transformers", "bitsandbytes")


def measure(name: str, configuration: Configuration, hardware: Hardware) -> dict[str, Any]:
    """A row, by ``COLUMNS``: the set-up, what it was predicted to hold and what two steps held.

    ``allocated``: bytes of tensors at the highest moment of the second step, which has optimizer states.
    ``reserved``: what PyTorch's allocator held for them (CUDA only). ``process``: what the system saw taken: on CUDA
    of the device's memory, on a CPU the process's largest resident memory.

    Raises:
        EdgePeftError: it would not fit, as predicted; nothing large was allocated.
    """
    recorded = probe.record(configuration, whole=False).tracker
    _check_room(name, configuration, hardware, recorded.peaks())
    predicted = max(
        peak.peak_bytes
        for phase, peak in recorded.peaks().items()
        if phase.rpartition(": ")[2] in ("forward+backward", "update")
    )
    work = [recorded.work()[phase] for phase in ("forward+backward", "update") if phase in recorded.work()]
    found = _on_cuda(configuration) if hardware.kind == "cuda" else _on_cpu(configuration)
    method = base.create(configuration.method, configuration.options)
    versions = " ".join(f"{library} {metadata.version(library)}" for library in LIBRARIES)
    return {
        "source": "edgepeft measure",
        "model": name,
        "method": method.name,
        "config": repr(method),
        "dtype": configuration.precision,
        "quant": configuration.precision if precision.is_packed(configuration.precision) else "none",
        "optimizer": "the method's own" if configuration.optimizer == ADAMW else configuration.optimizer,
        "microbatch": configuration.microbatch,
        "seq_len": configuration.tokens,
        "target_len": configuration.target_tokens if configuration.task == "seq2seq" else "",
        "grad_ckpt": configuration.checkpointing,
        "gpu": hardware.title,
        "peak_mem_gb": round(found["allocated_bytes"] / GiB, 4),
        "peak_definition": "tensor bytes of a step with optimizer states, GiB",
        "throughput": f"{found['seconds']:.4f} s/step",
        "notes": f"{versions} python {platform.python_version()} {platform.platform()}; "
        "weights random; one token of padding",
        "predicted_bytes": predicted,
        "predicted_seconds": round(sum(roofline.seconds(each, hardware) for each in work), 4) if work else "",
        **found,
    }


def measure_model(
    source: backbone.Source,
    hardware: Hardware,
    *,
    task: str | None,
    method: str,
    options: Mapping[str, Any],
    precision_: str | None,
    microbatch: int,
    tokens: int,
    target_tokens: int,
    checkpointing: bool,
    optimizer: str = ADAMW,
) -> dict[str, Any]:
    """What ``edgepeft measure`` does.

    Raises:
        UsageError: an unknown name, a sequence the model cannot read, or a method that refuses the precision, the
            optimizer or checkpointing.
        EdgePeftError: it would not fit.
    """
    at = precision_ or base.implied_precision(method) or ("bf16" if hardware.bf16 else "fp32")
    precision.check(at)
    chosen = base.create(method, options)
    chosen.check(at)
    chosen.check_optimizer(optimizer)
    if checkpointing:
        chosen.check_checkpointing()
    if optimizer == EIGHT_BIT:
        eight_bit.check(hardware.kind)
    config = backbone.config(source)
    positions_left(source.name, backbone.positions(config), method, chosen.positions(config), tokens)
    configuration = Configuration(
        model=backbone.as_fields(config),
        task=task or tasks.usual_task(config),
        method=method,
        options=options,
        precision=at,
        checkpointing=checkpointing,
        microbatch=microbatch,
        tokens=tokens,
        target_tokens=target_tokens,
        labels=2,
        accumulates=True,
        cuda=hardware.kind == "cuda",
        bf16=hardware.bf16,
        optimizer=optimizer,
    )
    return measure(source.name, configuration, hardware)


def _check_room(name: str, configuration: Configuration, hardware: Hardware, peaks: Mapping[str, Peak]) -> None:
    """Refuse what does not fit: a system that runs out of memory kills the process without a word."""
    phase, peak = max(peaks.items(), key=lambda item: item[1].peak_bytes)
    need = needed_bytes(peak.peak_bytes, hardware)
    if need <= hardware.available_bytes:
        return
    largest_part = max(peak.bytes, key=lambda kind: peak.bytes[kind])
    smaller = "a smaller --microbatch or --seq-len, or " if largest_part in PASSING else ""
    raise EdgePeftError(
        f"{name} with {configuration.method} at {configuration.precision} needs {need / GiB:.1f} GiB, and "
        f"{hardware.available_bytes / GiB:.1f} GiB are free on this machine.",
        f"Largest part: {largest_part}, {peak.bytes[largest_part] / GiB:.1f} GiB, in {phase}.",
        f"Use {smaller}a --precision of fewer bits; `edgepeft plan --model {name}` looks for what fits.",
    )


def rows_of(path: Path) -> str:
    """The text of a file that rows can be added to; of one that is not there, none.

    Raises:
        UsageError: it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} holds no rows.", "It is not UTF-8 text.", "Give another file.") from error
    if text and text.partition("\n")[0] != ",".join(COLUMNS):
        raise UsageError(f"{path} holds other rows.", "Its first line is another header.", "Give another file.")
    return text if not text or text.endswith("\n") else f"{text}\n"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of them, which is made if it is not there."""
    before, text = rows_of(path), io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerow(row)
    write_text(path, before + text.getvalue())


def _on_cuda(configuration: Configuration) -> dict[str, Any]:
    free_bytes, _ = torch.cuda.mem_get_info()
    with _real_step(configuration, "cuda") as step:
        step()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        now_bytes, _ = torch.cuda.mem_get_info()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "process_bytes": max(0, free_bytes - now_bytes),
            "seconds": round(seconds, 4),
        }


def _on_cpu(configuration: Configuration) -> dict[str, Any]:
    """The second step is timed, and a third one watched: watching takes time."""
    with _real_step(configuration, "cpu") as step:
        step()
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        most_resident = resident.peak_bytes()
        tracker = Tracker(cuda=False)
        tracker.label_model(step.model, [])  # its gradients are recognised, which are not all results of operators
        tracker.label_optimizer(step.optimizer)
        tracker.label(step.batch.values(), "activations")
        with tracker.phase("step"):
            step()
        peak = tracker.peaks()["step"].peak_bytes
    return {
        "allocated_bytes": peak,
        "reserved_bytes": "",
        "process_bytes": most_resident,
        "seconds": round(seconds, 4),
    }


class _Step:
    """A configuration's real training step on one batch, as accumulation sees it: gradients of before are there."""

    def __init__(self, configuration: Configuration, device: str) -> None:
        config = backbone.as_config(configuration.model)
        with torch.device(device):
            made = backbone.skeleton(
                config, task=configuration.task, at=configuration.precision, labels=configuration.labels
            )
            method = base.create(configuration.method, configuration.options)
            base.apply(method, made)
        self.model: Any = made.model
        if configuration.checkpointing:
            recompute_activations(self.model)
        self.model.train()
        self.optimizer = method.stages()[0].made(self.model, 1e-3, 0.0, configuration.optimizer)
        self.step = TrainingStep(
            self.model,
            self.optimizer,
            clip_norm=None if method.updates_in_backward else 1.0,
            penalty=method.penalty,
            after_update=method.after_update,
        )
        batch = largest.batch(configuration)
        batch["attention_mask"][0, -1] = 0  # without any padding transformers drops the mask, and what it takes
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.accumulates = configuration.accumulates and not method.updates_in_backward

    def __call__(self) -> None:
        if self.accumulates:
            self.step.backward([self.batch], 1e-3)
        self.step.backward([self.batch], 1e-3)
        self.step.update(0.5)


@contextmanager
def _real_step(configuration: Configuration, device: str) -> Iterator[_Step]:
    """The step; its memory is free again afterwards."""
    step = _Step(configuration, device)
    yield step
    del step.model, step.optimizer, step.step
