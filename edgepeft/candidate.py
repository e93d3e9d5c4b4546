"""One configuration on one device: the largest microbatch that fits, its memory, and the time of an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgepeft import roofline
from edgepeft.cuda_device import BLAS_THREADS, Device
from edgepeft.hardware import Hardware
from edgepeft.surface import ADAMW, AFTERWARDS, PASSING, TRAINING, WORKING, Configuration, Surface

LARGEST_MICROBATCH = 1024
CPU_PROCESS_BYTES = 670 << 20  # measured: 580 MiB of imports, 40 to 130 of kernels (benchmarks/results/plan.md, part C)
KEPT = 0.4  # of what training frees glibc kept as much more, measured there on MiniLM, where memory is ample
TIGHT = 0.93  # a larger share of what is available is called tight: runs on NF4 took up to 6.4 % more than predicted


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration: the largest microbatch that fits, or microbatch 1 when none does, and its peak.

    Attributes:
        options: hyper-parameters of the method that are not its defaults.
        verdict: FITS, TIGHT (into the margin) or NO.
        peak_bytes: of tensors, in the phase that needs most; ``phase`` says which. ``bytes`` is it by kind.
        reserved_bytes: what the allocator holds for them; ``process_bytes``: with what the process needs besides.
        phases: every phase → bytes of tensors at its peak; those after training are ``merge``.
        least_bytes: what the process needs at microbatch 1.
        run_microbatch: the one that an update of the global batch is made of, which may be smaller;
            ``run_process_bytes``: what the process needs then, and ``merge_bytes``: of merging.
        update_seconds: estimated time of an update of the global batch, all sequences at full length; None where it
            does not fit. ``tokens_per_second``: the (source) tokens that go through it meanwhile.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str
    microbatch: int
    checkpointing: bool
    optimizer: str = ADAMW
    fits: bool
    verdict: str
    peak_bytes: int
    reserved_bytes: int
    process_bytes: int
    least_bytes: int
    phase: str
    bytes: Mapping[str, int]
    phases: Mapping[str, int]
    merge_bytes: int = 0
    run_microbatch: int = 0
    run_process_bytes: int = 0
    update_seconds: float | None = None
    tokens_per_second: float | None = None
    ample: bool = False
    """On a CPU: whether training may keep what it frees, which is faster (``heap.ample``); ``process_bytes`` has it."""

    strategy: str = ""
    """One of ``STRATEGIES``; nothing on one device. All numbers but the speed are those of one device of several."""

    @property
    def training_bytes(self) -> int:
        """The peak of all but what follows training."""
        return max(size for name, size in self.phases.items() if name not in AFTERWARDS)

    @property
    def step_bytes(self) -> int:
        """The peak of the training steps alone: what a run measures."""
        return max(size for name, size in self.phases.items() if name.endswith(("forward+backward", "update")))


def needed_bytes(reserved_bytes: int, hardware: Hardware) -> int:
    """Memory a process needs at least in which the allocator holds this much for tensors."""
    return reserved_bytes + CPU_PROCESS_BYTES if hardware.kind == "cpu" else reserved_bytes


def counted(hardware: Hardware, whole: bool) -> Sequence[str]:
    """The phases that must fit the device: on a GPU those of training, as what follows may be done beside it.

    Args:
        whole: whether what follows training is done here.
    """
    return TRAINING if hardware.kind == "cuda" or not whole else (*TRAINING, *AFTERWARDS)


def of(
    configuration: Configuration,
    traced: Surface,
    hardware: Hardware,
    fixed: int | None,
    global_batch: int,
    devices: int,
    strategy: str,
    whole: bool,
) -> Candidate:
    """The candidate of one device, which has ``global_batch`` examples of an update to itself."""
    traced = _of_architecture(traced, hardware)
    only = counted(hardware, whole)

    def need(size: int) -> int:
        return needed_bytes(traced.reserved_bytes(size, only), hardware)

    def largest(limit: float) -> int:
        low, high = 0, LARGEST_MICROBATCH  # the largest that fits is in [low, high]; 0 always does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if need(middle) <= limit else (low, middle - 1)
        return low

    def taken(size: int) -> tuple[int, bool]:
        """With what is kept of what is freed, where there is room for it."""
        least = need(size)
        kept = max(least, _with_kept(traced, hardware, size))
        ample = hardware.kind == "cpu" and kept <= hardware.available_bytes * TIGHT
        return (kept if ample else least), ample

    size = fixed or largest(hardware.available_bytes * TIGHT) or 1  # the margin is for one that cannot do without
    process, ample = taken(size)
    verdict = "NO" if process > hardware.available_bytes else "FITS"
    if verdict == "FITS" and process > hardware.available_bytes * TIGHT:
        verdict = "TIGHT"
    used = usable_microbatch(size, global_batch)
    phase, kinds = traced.at(size, only)
    peak = sum(kinds.values())
    seconds = None if verdict == "NO" else _update_seconds(traced, hardware, size, global_batch)
    return Candidate(
        method=configuration.method,
        options=configuration.options,
        precision=configuration.precision,
        microbatch=size,
        checkpointing=configuration.checkpointing,
        optimizer=configuration.optimizer,
        fits=verdict != "NO",
        verdict=verdict,
        peak_bytes=peak,
        reserved_bytes=traced.reserved_bytes(size, only),
        process_bytes=process,
        least_bytes=need(1),
        phase=phase,
        bytes=kinds,
        phases={name: sum(held.values()) for name, held in traced.peaks(size).items()},
        merge_bytes=sum(traced.peaks(used).get("merge", {}).values()),
        run_microbatch=used,
        run_process_bytes=taken(used)[0],
        update_seconds=seconds,
        tokens_per_second=None if seconds is None else devices * global_batch * configuration.tokens / seconds,
        ample=ample,
        strategy=strategy,
    )


def _of_architecture(traced: Surface, hardware: Hardware) -> Surface:
    """The surface with the workspaces that cuBLAS has on this GPU: those of traces are an Ampere's."""
    if hardware.kind == "cpu" or hardware.capability is None:
        return traced
    more = Device(hardware.capability).blas_workspace_bytes - Device().blas_workspace_bytes
    return traced.with_temporaries(BLAS_THREADS * more) if more else traced


def _with_kept(traced: Surface, hardware: Hardware, size: int) -> int:
    """What training takes of a process whose heap keeps what is freed."""
    _, kinds = traced.at(size, TRAINING)
    return needed_bytes(sum(kinds.values()) + round(KEPT * sum(kinds[kind] for kind in PASSING)), hardware)


def _update_seconds(traced: Surface, hardware: Hardware, largest: int, global_batch: int) -> float | None:
    if not traced.work:
        return None
    size = usable_microbatch(largest, global_batch)
    microbatch, update = (roofline.seconds(traced.work_at(size)[phase], hardware) for phase in WORKING)
    shared, summed = (roofline.sending_seconds(traced.sent.get(phase, 0), hardware) for phase in WORKING)
    # FSDP sends a layer's parameters while another computes; what DDP adds up is sent when all gradients are there.
    microbatch, update = max(microbatch, shared), update + summed
    return global_batch // size * microbatch + update


def usable_microbatch(largest: int, global_batch: int) -> int:
    """The largest divisor of the global batch that is not larger than ``largest``."""
    return next(size for size in range(min(largest, global_batch), 0, -1) if global_batch % size == 0)
