"""Search precision × method × checkpointing × microbatch for what fits a device, and choose."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepeft import hardware as profiles
from edgepeft import precision, probe
from edgepeft.errors import EdgePeftError
from edgepeft.hardware import Hardware
from edgepeft.methods import base

GiB = 2**30
LARGEST_MICROBATCH = 1024
COMFORTABLE = 4  # examples: below this a configuration is chosen only when nothing else fits
SLACK = 1.08  # an allowance for what the caching allocator reserves beyond what is allocated; not measured
CPU_PROCESS_BYTES = 500 << 20  # an allowance: imports alone were measured at 261 MB, the rest is for the allocator

# Safest first. LoRA on all linear layers was at least as good as full tuning on every T5 size of the survey (arXiv
# 2303.15647v2, table 5). Of the others that table has no rows here: they stand by how little memory they need.
PREFERRED = ("lora", "lst", "ln_tuning", "galore", "full")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration: the largest microbatch that fits, or microbatch 1 when none does, and its peak."""

    method: str
    precision: str
    microbatch: int
    checkpointing: bool
    fits: bool
    peak_bytes: int
    phase: str
    bytes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All candidates, best first, and which one to take."""

    hardware: Hardware
    model: str
    candidates: tuple[Candidate, ...]
    choice: int | None
    why: str

    def chosen(self) -> Candidate:
        """The candidate to take.

        Raises:
            EdgePeftError: nothing fits; says what would.
        """
        if self.choice is None:
            raise EdgePeftError(*self.nothing_fits())
        return self.candidates[self.choice]

    def nothing_fits(self) -> tuple[str, str, str]:
        """Fact, cause and remedy when there is no choice."""
        least = min(self.candidates, key=lambda candidate: candidate.peak_bytes)
        need = needed_bytes(least.peak_bytes, self.hardware)
        largest = max(least.bytes, key=lambda kind: least.bytes[kind])
        others = sorted((profiles.load(name) for name in profiles.names()), key=lambda h: h.available_bytes)
        enough = [h.name for h in others if needed_bytes(least.peak_bytes, h) <= h.available_bytes]
        remedy = f"It would fit {enough[0]}." if enough else "No profile of one device has that much."
        return (
            f"{self.model} does not fit {self.hardware.name} with any method: the least is {least.method} at "
            f"{least.precision} with {need / GiB:.1f} GiB, and {self.hardware.available_bytes / GiB:.1f} GiB are free.",
            f"Largest part: {largest}, {least.bytes[largest] / GiB:.1f} GiB.",
            f"{remedy} Shorter sequences (--seq-len) or a smaller model need less.",
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``--json`` and plan.json."""
        return {
            "hardware": self.hardware.name,
            "available_bytes": self.hardware.available_bytes,
            "model": self.model,
            "candidates": [dict(vars(candidate)) for candidate in self.candidates],
            "choice": self.choice,
            "why": self.why,
        }


def needed_bytes(peak_bytes: int, hardware: Hardware) -> int:
    """Memory a process needs for a peak of tensors."""
    extra = CPU_PROCESS_BYTES if hardware.kind == "cpu" else 0
    return round(peak_bytes * SLACK) + extra


def plan(
    *,
    name: str,
    model: Mapping[str, Any],
    task: str,
    hardware: Hardware,
    tokens: int,
    target_tokens: int = 128,
    labels: int = 2,
    global_batch: int = 16,
    methods: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    precisions: Sequence[str] | None = None,
    checkpointing: bool | None = None,
    microbatch: int | None = None,
    accumulates: bool = True,
    first: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Trace every candidate and choose.

    Args:
        name: how the user calls the model; ``model``: its configuration as plain data.
        tokens: longest sequence; ``target_tokens``: longest target (seq2seq).
        methods, precisions, checkpointing, microbatch: narrow the search to these.
        accumulates: whether an update may take several microbatches.
        first: trace in the order of preference and stop at the first that fits comfortably: the same choice, sooner.
        progress: called with how many configurations are traced, of how many.
    """
    wanted = [
        probe.Configuration(
            model=model,
            task=task,
            method=method,
            options=options or {},
            precision=at,
            checkpointing=again,
            microbatch=1,
            tokens=tokens,
            target_tokens=target_tokens,
            labels=labels,
            accumulates=accumulates,
            cuda=hardware.kind == "cuda",
            bf16=hardware.bf16,
        )
        for method in (methods or [name for name in PREFERRED if name in base.names()])
        for at in (precisions or default_precisions(hardware))
        if not (base.find(method).writes_backbone and precision.is_packed(at))
        for again in ([checkpointing] if checkpointing is not None else [False, True])
        if not again or base.find(method).backpropagates
    ]
    if not wanted:  # the precision that was asked for is one the method refuses
        for method in methods or ():
            for at in precisions or ():
                base.create(method, options).check(at)
    layers = probe.depth(model)
    wanted.sort(key=lambda configuration: _preference(configuration, hardware))
    candidates: list[Candidate] = []
    for part in [[configuration] for configuration in wanted] if first else [wanted]:
        for configuration, traced in zip(part, _trace_all(part, progress), strict=True):
            candidates.append(_candidate(configuration, traced, layers, hardware, microbatch))
        if first and candidates[-1].fits and _comfortable(candidates[-1], global_batch):
            break  # all others rank behind it
    candidates.sort(key=lambda candidate: _rank(candidate, global_batch, hardware))
    choice = 0 if candidates and candidates[0].fits else None
    return Plan(
        hardware=hardware,
        model=name,
        candidates=tuple(candidates),
        choice=choice,
        why="" if choice is None else _why(candidates, hardware),
    )


def default_precisions(hardware: Hardware) -> list[str]:
    """The unpacked precision that the hardware is good at, and the packed ones."""
    return ["bf16" if hardware.bf16 else "fp32", "int8", "nf4"]


def usable_microbatch(largest: int, global_batch: int) -> int:
    """The largest divisor of the global batch that is not larger than ``largest``."""
    return max(size for size in range(1, min(largest, global_batch) + 1) if global_batch % size == 0)


def _candidate(
    configuration: probe.Configuration, traced: probe.Surface, layers: int, hardware: Hardware, fixed: int | None
) -> Candidate:
    def fits(size: int) -> bool:
        return needed_bytes(traced.at(layers, size)[1].peak_bytes, hardware) <= hardware.available_bytes

    if fixed is not None:
        size, enough = fixed, fits(fixed)
    else:
        low, high = 0, LARGEST_MICROBATCH  # the largest that fits is in [low, high]; 0 always does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        size, enough = max(1, low), low > 0
    phase, peak = traced.at(layers, size)
    return Candidate(
        method=configuration.method,
        precision=configuration.precision,
        microbatch=size,
        checkpointing=configuration.checkpointing,
        fits=enough,
        peak_bytes=peak.peak_bytes,
        phase=phase,
        bytes=peak.bytes,
    )


def _rank(candidate: Candidate, global_batch: int, hardware: Hardware) -> tuple[Any, ...]:
    """Smaller is better: what fits, at a comfortable microbatch, by the safest method, in the most exact precision."""
    return (not candidate.fits, not _comfortable(candidate, global_batch), *_preference(candidate, hardware))


def _comfortable(candidate: Candidate, global_batch: int) -> bool:
    return candidate.microbatch >= min(COMFORTABLE, global_batch)


def _preference(wanted: Candidate | probe.Configuration, hardware: Hardware) -> tuple[int, int, bool]:
    order = [*default_precisions(hardware), *precision.PRECISIONS]
    known = wanted.method in PREFERRED
    return (
        PREFERRED.index(wanted.method) if known else -1,  # one's own method was asked for by name
        order.index(wanted.precision),
        wanted.checkpointing,
    )


def _why(candidates: Sequence[Candidate], hardware: Hardware) -> str:
    best = candidates[0]
    parts = [f"{best.method} is the safest method that fits with a microbatch of {best.microbatch}"]
    if precision.is_packed(best.precision):
        parts.append(f"{best.precision} because the weights do not fit well at {default_precisions(hardware)[0]}")
    if best.checkpointing:
        parts.append("activations are computed again in backward because keeping them does not fit well")
    return "; ".join(parts) + "."


def _trace_all(wanted: Sequence[probe.Configuration], progress: Callable[[int, int], None]) -> list[probe.Surface]:
    """Traces run in processes of their own, one per core: a crash in one says which, and leaves the rest alone."""
    progress(0, len(wanted))
    if len(wanted) == 1:
        found = [probe.surface(wanted[0])]
        progress(1, 1)
        return found
    workers = min(len(wanted), len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(probe.surface, configuration) for configuration in wanted]
        for done, _ in enumerate(concurrent.futures.as_completed(futures), start=1):
            progress(done, len(wanted))
        return [future.result() for future in futures]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
