"""Search precision × method × options × optimizer × checkpointing × microbatch for what fits a device, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import Any

from edgepeft import aside, evidence, roofline, sharding, traces
from edgepeft import candidate as on_device
from edgepeft.candidate import Candidate, needed_bytes
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.hardware import Hardware
from edgepeft.recipe import PRECISIONS, check_sharded
from edgepeft.surface import ADAMW, AFTERWARDS, DDP, EIGHT_BIT, FSDP, Configuration, Surface

GiB = 2**30
COMFORTABLE = 4  # examples: below this a method is planned in a smaller precision too, and with 8-bit states
SAVED = 0.75  # of an optimizer's states, by 8 bits for each number: of fp32 ones; of bf16 ones it is half
WORTH = 0.05  # of what a configuration takes; if 8 bits save less they are not tried
PACKED = ("int8", "nf4")

# What is planned when no method is named, safest first. On T5-large, 3B and 11B of the survey (arXiv 2303.15647v2,
# table 5) LoRA on all linears and Houlsby adapters were best on average, LN tuning close for far fewer parameters. LST
# and GaLore are not in that table: they stand by how little memory they need.
PREFERRED = ("lora", "houlsby", "ln_tuning", "lst", "galore", "full")


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
    times: str = ""
    """What the estimated times are worth."""
    devices: int = 1

    def job(self, candidate: Candidate) -> roofline.Job | None:
        """What the training of the job takes, as estimated; evaluations and checkpoints are not in it."""
        if self.updates is None or candidate.update_seconds is None:
            return None
        return roofline.job(self.updates, candidate.update_seconds, self.hardware, self.devices)

    def chosen(self, gpu: str = "") -> Candidate:
        """The candidate to take.

        Raises:
            EdgePeftError: nothing fits; says how to find what would, on the hardware that was asked for as ``gpu``.
        """
        if self.choice is None:
            raise EdgePeftError(*self.nothing_fits(gpu or self.hardware.name))
        return self.candidates[self.choice]

    @property
    def machine(self) -> str:
        """The device, with how many of it."""
        return self.hardware.name if self.devices == 1 else f"{self.devices} x {self.hardware.name}"

    @property
    def least(self) -> Candidate:
        """The candidate that needs least on one device."""
        return min(self.candidates, key=lambda candidate: candidate.process_bytes)

    def nothing_fits(self, gpu: str) -> tuple[str, str, str]:
        """Fact, cause and remedy when there is no choice."""
        least = self.least
        need = needed_bytes(least.reserved_bytes, self.hardware)
        tried = "any method" if len({each.method for each in self.candidates}) > 1 else least.method
        largest = max(least.bytes, key=lambda kind: least.bytes[kind])
        training = min(each.training_bytes for each in self.candidates)
        alone = least.phase in AFTERWARDS and needed_bytes(training, self.hardware) <= self.hardware.available_bytes
        remedy = "`edgepeft train` alone fits; export on another computer. " if alone else ""
        return (
            f"{self.model} does not fit {self.machine} with {tried}: the least is {least.method} at "
            f"{least.precision} with {need / GiB:.1f} GiB, and {self.hardware.available_bytes / GiB:.1f} GiB are free.",
            f"Largest part: {largest}, {least.bytes[largest] / GiB:.1f} GiB, in {least.phase}.",
            f"{remedy}`edgepeft plan --gpu {quote(gpu)} --model {quote(self.model)}` looks for what would.",
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


@traces.pooled()
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
    options: Sequence[Mapping[str, Any]] = ({},),
    precisions: Sequence[str] | None = None,
    checkpointing: bool | None = None,
    optimizer: str | None = None,
    microbatch: int | None = None,
    accumulates: bool = True,
    first: bool = False,
    sparing: bool = False,
    objective: str = "quality",
    examples: int | None = None,
    epochs: float = 1.0,
    devices: int = 1,
    strategy: str | None = None,
    whole: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Trace every candidate and choose.

    Args:
        name: how the user calls the model; ``model``: its configuration as plain data.
        tokens: longest sequence; ``target_tokens``: longest target (seq2seq).
        methods, precisions, checkpointing, microbatch: narrow the search to these.
        options: values of the methods' hyper-parameters that are tried, those that are wanted most first.
        optimizer: one of ``surface.OPTIMIZERS``; AdamW when not given, in 8 bits where nothing else fits well.
        accumulates: whether an update may take several microbatches.
        first: trace in the order of preference and stop at the first that fits comfortably: the same choice, sooner.
        sparing: trace each method in one precision after the other, and in none after one that fits comfortably.
        objective: what decides among what fits: quality (the safest method), memory (the smallest peak, of one example
            at a time) or speed (the shortest update, as estimated).
        examples: of the training data, seen ``epochs`` times: how many updates the job has.
        devices: how many of the hardware share a global batch, which is a multiple of it.
        strategy: one of ``surface.STRATEGIES``; both are planned when not given.
        whole: whether the model is merged and exported on the hardware too; a CPU's plan then counts it.
        progress: called with how many configurations are traced, of how many.
    """
    check_sharded(optimizer, strategy)
    microbatch = microbatch or (1 if objective == "memory" else None)
    share = global_batch // devices
    wanted = [
        Configuration(
            model=model,
            task=task,
            method=method,
            options=variant,
            precision=at,
            checkpointing=again,
            microbatch=1,
            tokens=tokens,
            target_tokens=target_tokens,
            labels=labels,
            accumulates=accumulates,
            cuda=hardware.kind == "cuda",
            bf16=hardware.bf16,
            optimizer=optimizer or ADAMW,
        )
        for method in (methods or PREFERRED)
        for at in (precisions or default_precisions(hardware))
        if not (traces.traits(method).writes_backbone and at in PACKED)
        for variant in options
        for again in ([checkpointing] if checkpointing is not None else [False, True])
        if not again or traces.traits(method).backpropagates
        if optimizer in (None, ADAMW) or not traces.traits(method).updates_in_backward
    ]
    if not wanted:  # the precision, the checkpointing or the optimizer that was asked for is one the method refuses
        from edgepeft.methods import base

        for made in (base.create(method, variant) for method in methods or () for variant in options):
            for at in precisions or ():
                made.check(at)
            if checkpointing:
                made.check_checkpointing()
            if optimizer is not None:
                made.check_optimizer(optimizer)
        raise UsageError("There is nothing to plan.", "No method and precision of those asked for go together.", "")
    wanted.sort(key=lambda configuration: _preference(configuration, hardware))
    candidates: list[Candidate] = []
    excluded: dict[str, str] = {}
    refused: EdgePeftError | None = None
    settled: set[str] = set()

    def safety(each: Candidate | Configuration) -> float:
        return _preference(each, hardware)[0]

    def fitting() -> float:
        return min((safety(each) for each in candidates if each.verdict == "FITS"), default=math.inf)

    def comfortable() -> float:
        return min((safety(each) for each in candidates if each.method in settled), default=math.inf)

    def consider(rounds: Sequence[Sequence[Configuration]]) -> None:
        nonlocal refused, settled
        for part in rounds:
            if first and all(safety(each) > fitting() or safety(each) >= comfortable() for each in part):
                return  # all that is left ranks behind what was found
            part = [configuration for configuration in part if configuration.method not in settled]
            for configuration, traced in zip(part, traces.find(part, progress), strict=True):
                if isinstance(traced, EdgePeftError):
                    refused = refused or traced  # of the precision that is wanted most
                    excluded.setdefault(configuration.method, traced.fact)
                elif devices > 1 and traces.traits(configuration.method).updates_in_backward:
                    excluded[configuration.method] = "It updates inside backward, before the devices share gradients."
                else:
                    size = share if traces.traits(configuration.method).updates_in_backward else microbatch
                    candidates.extend(
                        on_device.of(configuration, surface, hardware, size, share, devices, how, whole)
                        for how, surface in _shared(configuration, traced, devices, strategy)
                    )
            settled = {each.method for each in candidates if _comfortable(each, microbatch or share)}

    consider(_alike(wanted, hardware) if first else _rounds(wanted, sparing, objective))
    least = objective == "memory" and methods and not sparing
    tried = [each for each in wanted if least or safety(each) < comfortable()] if optimizer is None else []
    if tried:
        settled = set()
        fixed = None if objective == "memory" else microbatch
        gaining = [each for each in tried if _gains(each, candidates, hardware, fixed)]
        lighter = [replace(each, optimizer=EIGHT_BIT) for each in gaining]
        consider(_alike(lighter, hardware) if first else [lighter])
    if not candidates and refused is not None:
        raise refused
    if not candidates:  # what was asked for is excluded on several devices
        from edgepeft.methods import base

        for method in methods or ():
            base.create(method, options[0]).check_devices(devices, strategy)
    for method in {each.method for each in candidates}:  # refused on other precisions only
        excluded.pop(method, None)
    roomy = {_alike_in(each) for each in candidates if _comfortable(each, microbatch or share)}
    candidates.sort(key=lambda candidate: _rank(candidate, microbatch or share, roomy, hardware, objective))
    choice = 0 if candidates and candidates[0].fits else None
    return Plan(
        hardware=hardware,
        model=name,
        task=task,
        candidates=tuple(candidates),
        choice=choice,
        why=""
        if choice is None
        else _why(candidates, hardware, objective, microbatch or share) + _afterwards(candidates[0], hardware),
        excluded=excluded,
        updates=None if examples is None else math.ceil(epochs * math.ceil(examples / global_batch)),
        times=" ".join(roofline.caveats(hardware, devices)),
        devices=devices,
    )


def _alike(wanted: Sequence[Configuration], hardware: Hardware) -> list[list[Configuration]]:
    """Those that differ in options and checkpointing together, which are traced at once; in order of preference."""
    found: dict[tuple[Any, ...], list[Configuration]] = {}
    for configuration in wanted:
        found.setdefault(_preference(configuration, hardware)[:-1], []).append(configuration)
    return list(found.values())


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


def _shared(
    configuration: Configuration, traced: Surface, devices: int, strategy: str | None
) -> Iterator[tuple[str, Surface]]:
    """The surface of one of several devices, by the way in which they share the work."""
    if devices == 1:
        yield "", traced
        return
    if strategy in (None, DDP):
        yield DDP, sharding.replicated(traced, devices)
    shardable = traces.traits(configuration.method).shardable and configuration.optimizer == ADAMW
    if strategy in (None, FSDP) and shardable:
        found = sharding.inventory(traces.units(configuration), devices)
        if found.divisible:
            yield FSDP, sharding.sharded(traced, found)


def _alike_in(candidate: Candidate) -> tuple[str, str, str]:
    return candidate.method, candidate.precision, candidate.optimizer


def _rank(
    candidate: Candidate, wanted: int, roomy: Collection[tuple[str, str, str]], hardware: Hardware, objective: str
) -> tuple[Any, ...]:
    """Smaller is better: what fits with room to spare, by the safest method, in the most exact precision that takes a
    comfortable microbatch, and of that the shortest update: one of small microbatches is the same update.

    Args:
        roomy: the methods, precisions and optimizers with which something is comfortable.
    """
    if objective == "memory":
        return (not candidate.fits, candidate.process_bytes, *_preference(candidate, hardware))
    if objective == "speed":
        return (not candidate.fits, candidate.update_seconds or math.inf, *_preference(candidate, hardware))
    method, precision, lighter, again = _preference(candidate, hardware)
    cramped = _alike_in(candidate) not in roomy
    preference = (not candidate.fits, candidate.verdict == "TIGHT", method, cramped, precision, lighter)
    if candidate.strategy:  # several devices share the work to be done sooner; DDP where it fits, which sends less
        return (*preference, candidate.strategy, candidate.update_seconds or math.inf, again)
    return (*preference, candidate.update_seconds or math.inf, not _comfortable(candidate, wanted), again)


def _comfortable(candidate: Candidate, wanted: int) -> bool:
    """Whether it fits with room to spare, and with as many examples at once as are ``wanted``, or several."""
    return candidate.verdict == "FITS" and candidate.microbatch >= min(COMFORTABLE, wanted)


def _gains(wanted: Configuration, candidates: Sequence[Candidate], hardware: Hardware, fixed: int | None) -> bool:
    """Whether states in 8 bits would save a good part of what it takes, and enough of it to fit."""
    if traces.traits(wanted.method).updates_in_backward:
        return False
    same = (wanted.method, wanted.options, wanted.precision, wanted.checkpointing)
    for each in candidates:
        if (each.method, each.options, each.precision, each.checkpointing) != same:
            continue
        saved = round(SAVED * each.bytes["optimizer"])
        enough = needed_bytes(each.reserved_bytes - saved, hardware) <= hardware.available_bytes
        if enough and saved >= WORTH * each.reserved_bytes and not (fixed and each.verdict == "FITS"):
            return True
    return False


def _preference(wanted: Candidate | Configuration, hardware: Hardware) -> tuple[int, int, bool, bool]:
    order = [*default_precisions(hardware), *PRECISIONS]
    return (
        PREFERRED.index(wanted.method) if wanted.method in PREFERRED else len(PREFERRED),
        order.index(wanted.precision),
        wanted.optimizer == EIGHT_BIT,
        wanted.checkpointing,
    )


def _afterwards(best: Candidate, hardware: Hardware) -> str:
    obstacle = traces.traits(best.method).unexportable
    said = f" It can be trained, but not exported to ONNX. {obstacle}" if obstacle else ""
    if aside.leaves(hardware, best.merge_bytes):
        need = best.merge_bytes / GiB
        said += f" What follows training takes {need:.1f} GiB in fp32, which is done in the computer's own memory."
    return said


def _why(candidates: Sequence[Candidate], hardware: Hardware, objective: str, wanted: int) -> str:
    best = candidates[0]
    if objective == "memory":
        return f"{best.method} on {best.precision} takes least, {best.process_bytes / GiB:.1f} GiB."
    if objective == "speed":
        if best.update_seconds is None:
            return f"No time is known of these; {best.method} on {best.precision} is the safest that fits."
        return f"{best.method} on {best.precision} has the shortest update, estimated at {best.update_seconds:.2g} s."
    others = len({each.method for each in candidates}) > 1
    safest = "is the safest method that fits" if others else "fits"
    parts = [f"{best.method} {safest} with a microbatch of {best.microbatch}"]
    before = [each for each in candidates if each.fits and _preference(each, hardware) < _preference(best, hardware)]
    for other in {each.method: each for each in before if each.method != best.method}.values():
        tight = " and no room to spare" if other.verdict == "TIGHT" else ""
        parts.append(f"{other.method} fits with {other.microbatch}{tight}")
    if best.precision in PACKED and any(each.precision not in PACKED for each in candidates):
        parts.append(f"{best.precision} because the weights do not fit well at {default_precisions(hardware)[0]}")
    if best.optimizer == EIGHT_BIT and any(each.optimizer == ADAMW for each in candidates):
        parts.append("AdamW's states take 8 bits a number because in full they do not fit well")
    if best.checkpointing:
        parts.append("activations are computed again in backward because keeping them does not fit well")
    if best.strategy == FSDP:
        parts.append("FSDP2 divides parameters, gradients and optimizer states among the devices")
    elif best.strategy == DDP:
        parts.append("every device holds all of it (DDP)")
    return "; ".join(parts) + "."
