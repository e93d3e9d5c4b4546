"""Seconds from work: for each class of operator, the slower of computing and moving; and what a job takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgepeft.hardware import Hardware


class Work(NamedTuple):
    """What a class of operators does: number of calls, floating-point operations, bytes read and written."""

    calls: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Job:
    """What training takes. ``energy_wh`` and ``price`` (US dollars) only where the profile states what they need."""

    hours: float
    energy_wh: float | None
    price: float | None


def seconds(work: Mapping[str, Work], hardware: Hardware) -> float:
    """Time of ``work`` (by class, as ``work.Tally`` counts it) on a device.

    The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009), class by class: computing and moving
    overlap, so the slower of both counts. On a GPU the calls are issued by the processor while the device works, so
    the slower of *these* two counts as well; on a CPU a call's own time is added.
    """
    device = sum(max(*_times(kind, each, hardware)) for kind, each in work.items())
    issuing = sum(each.calls * _call_seconds(kind, hardware) for kind, each in work.items())
    return max(device, issuing) if hardware.kind == "cuda" else device + issuing


def sending_seconds(sent_bytes: float, hardware: Hardware) -> float:
    """Time in which one of several devices sends so many bytes to others and receives as many.

    Processes on a CPU pass it through memory. A GPU without an interconnect is alone, and sends nothing.
    """
    return sent_bytes / ((hardware.interconnect or hardware.bandwidth) * reached(hardware, "sending"))


def along(low: Mapping[str, Work], high: Mapping[str, Work], place: float) -> dict[str, Work]:
    """Work between two traces, or beyond them: all of it is affine in depth and in microbatch. 0 is low, 1 is high."""
    nothing = Work(0, 0, 0)
    pairs = {kind: (low.get(kind, nothing), high.get(kind, nothing)) for kind in [*low, *(high.keys() - low.keys())]}
    return {
        kind: Work(*(max(0, round(a + place * (b - a))) for a, b in zip(one, other, strict=True)))
        for kind, (one, other) in pairs.items()
    }


def job(updates: int, update_seconds: float, hardware: Hardware, devices: int = 1) -> Job:
    """Hours, energy and price of a number of updates on so many devices together."""
    hours = updates * update_seconds / 3600
    watts, price = (None if each is None else devices * hours * each for each in (hardware.watts, hardware.price))
    return Job(hours, watts, price)


def _times(kind: str, work: Work, hardware: Hardware) -> tuple[float, float]:
    """Seconds of computing and of moving."""
    operation, _, dtype = kind.partition(".")
    computing = work.flops / (peak(hardware, dtype) * reached(hardware, operation, dtype)) if work.flops else 0.0
    moving = work.bytes / (hardware.bandwidth * reached(hardware, _MOVES.get(operation, operation)))
    return computing, moving


def peak(hardware: Hardware, dtype: str) -> float:
    """FLOP/s of products of a dtype; what is not native is multiplied in fp32."""
    return hardware.flops.get(dtype, hardware.flops["fp32"])


def reached(hardware: Hardware, operation: str, dtype: str = "fp32") -> float:
    """The share of a device's peak that an operation reaches: the profile's, else what is usual for its kind.

    Args:
        dtype: what it computes in, for those whose share it may change. One that is not native is computed in fp32.
    """
    of_dtype = f"{operation}.{dtype if dtype in hardware.flops else 'fp32'}"
    for shares in (hardware.reached, USUAL[hardware.kind]):
        for name in (of_dtype, operation):
            if name in shares:
                return shares[name]
    raise KeyError(operation)


def _call_seconds(kind: str, hardware: Hardware) -> float:
    stated = hardware.call_seconds if hardware.call_seconds is not None else CALL_SECONDS[hardware.kind]
    return stated * (VIEW if kind == "view" else 1.0)


_MOVES = {"matmul": "elementwise", "thin": "elementwise", "attention": "elementwise", "view": "elementwise"}

# What is usual, for profiles that do not say it.
# cuda: the best products reach 80.3 % of the peak of an H100, 81.1 and 86.9 % of an A100's (stas00/ml-engineering,
# "Maximum Achievable Matmul FLOPS"); FlashAttention-2 reaches 50 to 73 % of an A100's (arXiv 2307.08691); copies and
# sums reach about 80 % of a data sheet's bandwidth (BabelStream: Deakin et al., IJCSE 17(3), 2018), and everything else
# that memory limits is taken to do the same.
# sending: NCCL reaches about 370 of the 450 GB/s of NVLink 4, the rest is its protocol's (NVIDIA/nccl-tests issue 212).
# cpu: measured by tools/probe.py on one core of an AMD EPYC of the fourth generation, against the peaks that
# hardware.detect derives from its clock and instructions, and against the bandwidth of a copy.
USUAL: Mapping[str, Mapping[str, float]] = {
    "cuda": {"matmul": 0.8, "thin": 0.8, "attention": 0.5}
    | dict.fromkeys(("elementwise", "curved", "random", "dequantize", "optimizer", "requantize", "sending"), 0.8),
    "cpu": {"matmul": 0.9, "thin": 0.4, "attention": 0.3, "attention.fp32": 0.45, "attention.bf16": 0.13}
    | {
        "elementwise": 0.8,
        "curved": 0.35,
        "random": 0.03,
        "dequantize": 0.6,
        "optimizer": 1.0,
        "requantize": 0.02,
        "sending": 0.8,
    },
}

# cuda: 7 us for Python, dispatch and recording of an operator on a tensor that needs gradients (pytorch/pytorch issue
# 41383), and about 3 us for the launch. cpu: measured by tools/probe.py on the machine above.
CALL_SECONDS: Mapping[str, float] = {"cuda": 10e-6, "cpu": 3e-6}
VIEW = 0.3  # a view is dispatched and recorded, but nothing is allocated or launched


_TIMES = (
    "Times are estimated from what each class of operators computes and moves, for sequences at full length; "
    "evaluation, checkpoints and reading data are not in them. The survey's methods they put in order with a rank "
    "correlation of 0.72 on T5-large and 0.83 on T5-3B (benchmarks/results/time.md)."
)
_APART = "Sending between devices is counted at the rate of the profile's interconnect, that of devices in one machine."


def caveats(hardware: Hardware, devices: int) -> Iterator[str]:
    """What who reads estimates of time should know, a sentence or more each."""
    yield _TIMES
    if devices > 1:
        yield _APART
    if hardware.guessed:
        what = ", ".join(hardware.guessed)
        yield f"They rest on guesses of {what}: for {hardware.title} no data sheet is known here."
