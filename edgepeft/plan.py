"""Search precision × method × checkpointing × microbatch for what fits a device, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgepeft import evidence, roofline, traces
from edgepeft import hardware as profiles
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.hardware import Hardware
from edgepeft.surface import TRAINING, WORKING, Configuration, Surface

GiB = 2**30
LARGEST_MICROBATCH = 1024
COMFORTABLE = 4  # examples: below this a configuration is chosen only when nothing else fits
CPU_PROCESS_BYTES = 540 << 20  # measured: 505 MiB of imports, 35 MiB of kernels' code and scratch
HEAP = 1.3  # an allowance: glibc kept 18 to 36 % beyond tensors in what was measured (benchmarks/results/plan.md)

TIMES = (
    "Times are estimated from what each class of operators computes and moves, for sequences at full length; "
    "evaluation, checkpoints and reading data are not in them. The survey's methods they put in order with a rank "
    "correlation of 0.72 on T5-large and 0.87 on T5-3B (benchmarks/results/time.md)."
)
APART = (
    "Sending between devices is not in them, and networks differ: several devices take longer. The plan covers several "
    "devices; `edgepeft run` trains on one so far."
)
TIGHT = 0.93  # a larger share of what is available is called tight: runs on NF4 took up to 6.4 % more than predicted
PACKED = ("int8", "nf4")
PRECISIONS = ("fp32", "bf16", *PACKED)

# What is planned when no method is named, safest first. On T5-large, 3B and 11B of the survey (arXiv 2303.15647v2,
# table 5) LoRA on all linears and Houlsby adapters were best on average, LN tuning close for far fewer parameters. LST
# and GaLore are not in that table: they stand by how little memory they need.
PREFERRED = ("lora", "houlsby", "ln_tuning", "lst", "galore", "full")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration: the largest microbatch that fits, or microbatch 1 when none does, and its peak.

    Attributes:
        verdict: FITS, TIGHT (into the margin) or NO.
        peak_bytes: of tensors, in the phase that needs most; ``phase`` says which. ``bytes`` is it by kind.
        reserved_bytes: what the allocator holds for them; ``process_bytes``: with what the process needs besides.
        phases: every phase → bytes of tensors at its peak; those after training are ``merge``.
        update_seconds: estimated time of an update of the global batch, all sequences at full length; None where it
            does not fit. ``tokens_per_second``: the (source) tokens that go through it meanwhile.
    """

    method: str
    precision: str
    microbatch: int
    checkpointing: bool
    fits: bool
    verdict: str
    peak_bytes: int
    reserved_bytes: int
    process_bytes: int
    phase: str
    bytes: Mapping[str, int]
    phases: Mapping[str, int]
    update_seconds: float | None = None
    tokens_per_second: float | None = None
    strategy: str = ""
    """How several devices share the work: ddp or fsdp; nothing on one. All numbers but the speed are one device's."""

    @property
    def step_bytes(self) -> int:
        """The peak of the training steps alone: what a run measures."""
        return max(size for name, size in self.phases.items() if name.endswith(("forward+backward", "update")))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All candidates, best first, and which one to take."""

    hardware: Hardware
    model: str
    task: str
    candidates: tuple[Candidate, ...]
    choice: int | None
    why: str
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Methods that cannot be planned for this model, with the reason."""
    updates: int | None = None
    """Of the whole job, where it is known how much data there is."""
    times: str = TIMES
    """What the estimated times are worth."""
    devices: int = 1

    def job(self, candidate: Candidate) -> roofline.Job | None:
        """What the training of the job takes, as estimated; evaluations and checkpoints are not in it."""
        if self.updates is None or candidate.update_seconds is None:
            return None
        return roofline.job(self.updates, candidate.update_seconds, self.hardware, self.devices)

    def chosen(self) -> Candidate:
        """The candidate to take.

        Raises:
            EdgePeftError: nothing fits; says what would.
        """
        if self.choice is None:
            raise EdgePeftError(*self.nothing_fits())
        return self.candidates[self.choice]

    @property
    def machine(self) -> str:
        """The device, with how many of it."""
        return self.hardware.name if self.devices == 1 else f"{self.devices} x {self.hardware.name}"

    @property
    def least(self) -> Candidate:
        """The candidate that needs least on one device."""
        return min(self.candidates, key=lambda candidate: candidate.process_bytes)

    def nothing_fits(self) -> tuple[str, str, str]:
        """Fact, cause and remedy when there is no choice."""
        least = self.least
        need = needed_bytes(least.reserved_bytes, self.hardware)
        tried = "any method" if len({each.method for each in self.candidates}) > 1 else least.method
        largest = max(least.bytes, key=lambda kind: least.bytes[kind])
        others = sorted((profiles.load(name) for name in profiles.names()), key=lambda h: h.available_bytes)
        enough = [h.name for h in others if needed_bytes(least.reserved_bytes, h) <= h.available_bytes]
        remedy = f"It would fit {enough[0]}." if enough else "No profile of one device has that much."
        return (
            f"{self.model} does not fit {self.machine} with {tried}: the least is {least.method} at "
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
            "task": self.task,
            "candidates": [self._candidate_as_json(candidate) for candidate in self.candidates],
            "devices": self.devices,
            "updates": self.updates,
            "times": self.times,
            "choice": self.choice,
            "why": self.why,
            "excluded": dict(self.excluded),
            "evidence": {each.method: evidence.of(each.method) for each in self.candidates},
            "sources": evidence.sources(),
        }

    def _candidate_as_json(self, candidate: Candidate) -> dict[str, Any]:
        job = self.job(candidate)
        return {**vars(candidate), "job": None if job is None else vars(job)}


def needed_bytes(reserved_bytes: int, hardware: Hardware) -> int:
    """Memory a process needs in which the allocator holds this much for tensors."""
    return round(reserved_bytes * HEAP) + CPU_PROCESS_BYTES if hardware.kind == "cpu" else reserved_bytes


def counted(hardware: Hardware) -> Sequence[str]:
    """The phases that must fit the device: all of them on a CPU; on a GPU, merging may be left to the host."""
    return TRAINING if hardware.kind == "cuda" else (*TRAINING, "merge")


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
    sparing: bool = False,
    objective: str = "quality",
    examples: int | None = None,
    epochs: float = 1.0,
    devices: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Trace every candidate and choose.

    Args:
        name: how the user calls the model; ``model``: its configuration as plain data.
        tokens: longest sequence; ``target_tokens``: longest target (seq2seq).
        methods, precisions, checkpointing, microbatch: narrow the search to these.
        accumulates: whether an update may take several microbatches.
        first: trace in the order of preference and stop at the first that fits comfortably: the same choice, sooner.
        sparing: trace each method in one precision after the other, and in none after one that fits comfortably.
        objective: what decides among what fits: quality (the safest method), memory (the smallest peak) or speed (the
            shortest update, as estimated).
        examples: of the training data, seen ``epochs`` times: how many updates the job has.
        devices: how many of the hardware share a global batch, which is a multiple of it.
        progress: called with how many configurations are traced, of how many.
    """
    wanted = [
        Configuration(
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
        for method in (methods or PREFERRED)
        for at in (precisions or default_precisions(hardware))
        if not (traces.traits(method).writes_backbone and at in PACKED)
        for again in ([checkpointing] if checkpointing is not None else [False, True])
        if not again or traces.traits(method).backpropagates
    ]
    if not wanted:  # the precision or the checkpointing that was asked for is one the method refuses
        from edgepeft.methods import base

        for method in methods or ():
            for at in precisions or ():
                base.create(method, options).check(at)
            if checkpointing:
                base.create(method, options).check_checkpointing()
        raise UsageError("There is nothing to plan.", "No method and precision of those asked for go together.", "")
    wanted.sort(key=lambda configuration: _preference(configuration, hardware))
    candidates: list[Candidate] = []
    excluded: dict[str, str] = {}
    refused: EdgePeftError | None = None
    settled: set[str] = set()
    for part in [[configuration] for configuration in wanted] if first else _rounds(wanted, sparing, objective):
        part = [configuration for configuration in part if configuration.method not in settled]
        for configuration, traced in zip(part, traces.find(part, progress), strict=True):
            if isinstance(traced, EdgePeftError):
                refused = refused or traced  # of the precision that is wanted most
                excluded.setdefault(configuration.method, traced.fact)
            elif devices > 1 and traces.traits(configuration.method).updates_in_backward:
                excluded[configuration.method] = "It updates inside backward, before the devices share gradients."
            else:
                candidates += [
                    _candidate(configuration, surface, hardware, microbatch, global_batch // devices, devices, strategy)
                    for strategy, surface in _shared(configuration, traced, devices)
                ]
        settled = {each.method for each in candidates if each.fits and _comfortable(each, global_batch)}
        if first and settled:
            break  # all others rank behind it
    if not candidates and refused is not None:
        raise refused
    for method in {each.method for each in candidates}:  # refused on other precisions only
        excluded.pop(method, None)
    candidates.sort(key=lambda candidate: _rank(candidate, global_batch // devices, hardware, objective))
    choice = 0 if candidates and candidates[0].fits else None
    return Plan(
        hardware=hardware,
        model=name,
        task=task,
        candidates=tuple(candidates),
        choice=choice,
        why="" if choice is None else _why(candidates, hardware, objective) + _afterwards(candidates[0].method),
        excluded=excluded,
        updates=None if examples is None else math.ceil(epochs * math.ceil(examples / global_batch)),
        times=TIMES if devices == 1 else f"{TIMES} {APART}",
        devices=devices,
    )


def _rounds(wanted: Sequence[Configuration], sparing: bool, objective: str) -> list[list[Configuration]]:
    """What is traced at once: all of it, or the precisions one after the other, the one that is wanted most first."""
    if not sparing:
        return [list(wanted)]
    precisions = list(dict.fromkeys(configuration.precision for configuration in wanted))
    if objective == "memory":
        precisions.reverse()  # the preference is from exact to small
    return [[configuration for configuration in wanted if configuration.precision == at] for at in precisions]


def default_precisions(hardware: Hardware) -> list[str]:
    """The unpacked precision that the hardware is good at, and the packed ones."""
    return ["bf16" if hardware.bf16 else "fp32", *PACKED]


def usable_microbatch(largest: int, global_batch: int) -> int:
    """The largest divisor of the global batch that is not larger than ``largest``."""
    return max(size for size in range(1, min(largest, global_batch) + 1) if global_batch % size == 0)


def _shared(configuration: Configuration, traced: Surface, devices: int) -> list[tuple[str, Surface]]:
    """The surface of one of several devices, by the way in which they share the work."""
    if devices == 1:
        return [("", traced)]
    from edgepeft import sharding  # loads torch

    found = sharding.of(configuration, devices)
    ways = [(sharding.DDP, sharding.replicated(traced, found))]
    return [*ways, (sharding.FSDP, sharding.sharded(traced, found))] if found.divisible else ways


def _candidate(
    configuration: Configuration,
    traced: Surface,
    hardware: Hardware,
    fixed: int | None,
    global_batch: int,
    devices: int,
    strategy: str,
) -> Candidate:
    """The candidate of one device, which has ``global_batch`` examples of an update to itself."""
    only = counted(hardware)

    def need(size: int) -> int:
        return needed_bytes(traced.reserved_bytes(size, only), hardware)

    def largest(limit: float) -> int:
        low, high = 0, LARGEST_MICROBATCH  # the largest that fits is in [low, high]; 0 always does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if need(middle) <= limit else (low, middle - 1)
        return low

    # Room is left if any microbatch allows it; else the margin is used, and the verdict says so.
    size = fixed or largest(hardware.available_bytes * TIGHT) or largest(hardware.available_bytes) or 1
    process = need(size)
    verdict = "NO" if process > hardware.available_bytes else "FITS"
    if verdict == "FITS" and process > hardware.available_bytes * TIGHT:
        verdict = "TIGHT"
    phase, kinds = traced.at(size, only)
    peak = sum(kinds.values())
    seconds = None if verdict == "NO" else _update_seconds(traced, hardware, size, global_batch)
    return Candidate(
        method=configuration.method,
        precision=configuration.precision,
        microbatch=size,
        checkpointing=configuration.checkpointing,
        fits=verdict != "NO",
        verdict=verdict,
        peak_bytes=peak,
        reserved_bytes=traced.reserved_bytes(size, only),
        process_bytes=process,
        phase=phase,
        bytes=kinds,
        phases={name: sum(held.values()) for name, held in traced.peaks(size).items()},
        update_seconds=seconds,
        tokens_per_second=None if seconds is None else devices * global_batch * configuration.tokens / seconds,
        strategy=strategy,
    )


def _update_seconds(traced: Surface, hardware: Hardware, largest: int, global_batch: int) -> float | None:
    if not traced.work:
        return None
    size = usable_microbatch(largest, global_batch)
    microbatch, update = (roofline.seconds(traced.work_at(size)[phase], hardware) for phase in WORKING)
    return global_batch // size * microbatch + update


def _rank(candidate: Candidate, global_batch: int, hardware: Hardware, objective: str) -> tuple[Any, ...]:
    """Smaller is better: what fits, at a comfortable microbatch, by the safest method, in the most exact precision."""
    if objective == "memory":
        return (not candidate.fits, candidate.process_bytes / candidate.microbatch, candidate.method)
    if objective == "speed":
        return (not candidate.fits, candidate.update_seconds or math.inf, *_preference(candidate, hardware))
    preference = (*_preference(candidate, hardware), candidate.strategy)
    return (not candidate.fits, not _comfortable(candidate, global_batch), *preference)


def _comfortable(candidate: Candidate, global_batch: int) -> bool:
    return candidate.microbatch >= min(COMFORTABLE, global_batch)


def _preference(wanted: Candidate | Configuration, hardware: Hardware) -> tuple[int, int, bool]:
    order = [*default_precisions(hardware), *PRECISIONS]
    return (
        PREFERRED.index(wanted.method) if wanted.method in PREFERRED else len(PREFERRED),
        order.index(wanted.precision),
        wanted.checkpointing,
    )


def _afterwards(method: str) -> str:
    obstacle = traces.traits(method).unexportable
    return f" It can be trained, but not exported to ONNX. {obstacle}" if obstacle else ""


def _why(candidates: Sequence[Candidate], hardware: Hardware, objective: str) -> str:
    best = candidates[0]
    if objective == "memory":
        return f"{best.method} on {best.precision} needs least for each example of its microbatch."
    if objective == "speed":
        if best.update_seconds is None:
            return f"No time is known of these; {best.method} on {best.precision} is the safest that fits."
        return f"{best.method} on {best.precision} has the shortest update, estimated at {best.update_seconds:.2g} s."
    others = len({each.method for each in candidates}) > 1
    safest = "is the safest method that fits" if others else "fits"
    parts = [f"{best.method} {safest} with a microbatch of {best.microbatch}"]
    if best.precision in PACKED:
        parts.append(f"{best.precision} because the weights do not fit well at {default_precisions(hardware)[0]}")
    if best.checkpointing:
        parts.append("activations are computed again in backward because keeping them does not fit well")
    if best.strategy == "fsdp":
        parts.append("FSDP2 divides parameters, gradients and optimizer states among the devices")
    elif best.strategy == "ddp":
        parts.append("every device holds all of it (DDP)")
    return "; ".join(parts) + "."
