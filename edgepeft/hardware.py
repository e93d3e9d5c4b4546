"""What a device has: memory, bandwidth, FLOP/s. Read from profiles/*.toml, or found out from this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from edgepeft import machine, rates
from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.profile import Table

AUTO = "auto"
INTERCONNECT = 15.75e9  # of GPUs in a computer that no profile is for: PCIe 3.0 with 16 lanes, each way


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The processor of a board whose GPU shares its memory: device folders run on it, without CUDA."""

    reserved_bytes: int
    """What is taken of the board's memory before a process without CUDA starts: the operating system."""
    flops: Mapping[str, float] = field(hash=False)
    """As those of ``Hardware``."""
    instructions: tuple[str, ...] = ()
    """As those of ``Hardware``."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, as the planner sees it. Peaks and capacities, not what a program reaches."""

    name: str
    kind: Literal["cuda", "cpu"]
    title: str
    memory_bytes: int
    """What the driver or the operating system reports as the total, not what the box says."""
    reserved_bytes: int
    """What is taken before the first tensor: CUDA context, display, operating system."""
    bandwidth: float
    """Bytes per second between the device and its memory."""
    flops: Mapping[str, float] = field(hash=False)
    """Dense FLOP/s per dtype (fp32, bf16, fp16, int8), accumulated in fp32 or int32. An absent dtype is not native."""
    providers: tuple[str, ...]
    """ONNX Runtime execution providers, best first."""
    cores: int | None = None
    """Processor cores that a process may use."""
    instructions: tuple[str, ...] = ()
    """Instruction sets of a CPU that matter for tensors, named as in /proc/cpuinfo."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, as (9, 0); absent: that of an Ampere is planned with."""
    devices: tuple[str, ...] = ()
    """Names under which the CUDA driver reports this device."""
    reached: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The share of the peak that kernels reach, by operation (``profile.OPERATIONS``) or by operation and dtype
    (``attention.bf16``): of FLOP/s in products and attention, of bandwidth in the others, of the interconnect in
    sending. What moves bytes may exceed 1 where caches serve. Absent: what is usual for the kind of device."""
    interconnect: float | None = None
    """Bytes per second that a device sends to others like it in one machine while it receives as many; absent of a GPU
    that is alone in its machine."""
    call_seconds: float | None = None
    """Time that PyTorch takes to issue one operator; absent: what is usual."""
    watts: float | None = None
    """Power drawn while training."""
    price: float | None = None
    """US dollars an hour."""
    processor: Processor | None = None
    """Of a board: its memory is that of the GPU, and so are its cores and bandwidth, which the two share."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Where each number is from, by field; of tables by entry, as "flops.bf16" or "processor.reserved_bytes"."""

    @property
    def available_bytes(self) -> int:
        """What is left for weights, activations and everything else of ours."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 is native (Ampere and later; CPUs with AVX512-BF16, AMX or Arm's BF16)."""
        return "bf16" in self.flops

    @property
    def several(self) -> bool:
        """Whether there are machines with several of it that share the work."""
        return self.kind == "cuda" and self.interconnect is not None

    @property
    def guessed(self) -> tuple[str, ...]:
        """The rates that estimates of time rest on and whose source calls them a guess, as ("bandwidth", "flops.bf16").

        Empty where all are known.
        """
        every = ("bandwidth", *(f"flops.{dtype}" for dtype in self.flops))
        return tuple(rate for rate in every if "guess" in self.sources.get(rate, ""))

    @property
    def runner(self) -> Hardware | None:
        """What runs a device folder there, which uses no GPU: a CPU itself, or a board's processor."""
        if self.kind == "cpu" or self.processor is None:
            return self if self.kind == "cpu" else None
        own = {name: text for name, text in self.sources.items() if name.startswith("processor.")}
        kept = ("memory_bytes", "bandwidth", "cores", "watts", "price")
        return Hardware(
            name=self.name,
            kind="cpu",
            title=f"processor of {self.title}",
            memory_bytes=self.memory_bytes,
            reserved_bytes=self.processor.reserved_bytes,
            bandwidth=self.bandwidth,
            flops=self.processor.flops,
            providers=("CPUExecutionProvider",),
            cores=self.cores,
            instructions=self.processor.instructions,
            watts=self.watts,
            price=self.price,
            sources={name: text for name, text in self.sources.items() if name in kept}
            | {name.removeprefix("processor."): text for name, text in own.items()},
        )

    def shared(self, devices: int) -> Hardware:
        """What each of several processes has: of a CPU its part, of GPUs one."""
        if self.kind == "cuda" or devices == 1:
            return self
        return replace(
            self,
            reserved_bytes=self.memory_bytes - self.available_bytes // devices,
            bandwidth=self.bandwidth / devices,
            flops={dtype: rate / devices for dtype, rate in self.flops.items()},
            cores=self.cores and max(1, self.cores // devices),
        )


def names() -> list[str]:
    """The shipped profiles, sorted. The name of a profile is the name of its file."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load(name: str) -> Hardware:
    """A shipped profile, a profile of the user's own (a path that ends in ``.toml``), or this machine (``auto``).

    Raises:
        UsageError: there is no such profile, or it is malformed (naming file and field).
    """
    if name == AUTO:
        return detect()
    if name.endswith(".toml"):
        return _read(Path(name).expanduser())
    known = names()
    if name not in known:
        raise UsageError(
            f"There is no hardware profile called {name!r}.",
            "",
            f"{nearest(name.lower(), [*known, AUTO])} A path to a .toml file of your own works too.",
        )
    return _read(_folder() / f"{name}.toml")


def detect() -> Hardware:
    """This machine: its first CUDA device when PyTorch sees one, else its CPU."""
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            free_bytes, memory_bytes = torch.cuda.mem_get_info()  # of the current device, which is the first
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())  # unless there are ranks
            return _cuda(
                device=properties.name,
                memory_bytes=memory_bytes,
                used_bytes=memory_bytes - free_bytes,
                multiprocessors=properties.multi_processor_count,
                capability=(properties.major, properties.minor),
                # Not every version of PyTorch has these, and not every driver tells; both clocks are in kHz.
                hertz=1e3 * getattr(properties, "clock_rate", 0),
                bandwidth=2e3
                * getattr(properties, "memory_clock_rate", 0)
                * getattr(properties, "memory_bus_width", 0)
                / 8,
                integrated=bool(properties.is_integrated),
            )
    return _cpu()


def runner(name: str) -> Hardware:
    """What runs device folders on a device (a name as ``load`` takes it): itself, or the processor beside its GPU.

    Raises:
        UsageError: a GPU in a computer of which nothing else is known; and what ``load`` raises.
    """
    device = load(name)
    if device.runner is not None:
        return device.runner
    if name == AUTO:
        return _cpu()
    able = [each for each in names() if load(each).runner is not None]
    raise UsageError(
        f"{device.name} runs no device folder.",
        "Device folders run on the processor, and this is the profile of a GPU in a computer.",
        f"Name a CPU's profile or a board: {', '.join(able)}, or {AUTO} for this computer's processor.",
    )


# ---------------------------------------------------------------------------------------------- profiles


def _folder() -> Path:
    """``profiles`` inside the installed package, or beside the package in a checkout."""
    for folder in (Path(__file__).parent / "profiles", Path(__file__).parents[1] / "profiles"):
        if folder.is_dir():
            return folder
    raise EdgePeftError(
        "The hardware profiles are missing.", "The installation is incomplete.", "Install edgepeft again."
    )


def _read(path: Path) -> Hardware:
    table = Table(path)
    kind: Literal["cuda", "cpu"] = "cuda"
    if (stated := table.text("kind")) == "cpu":
        kind = "cpu"
    elif stated != "cuda":
        raise table.error("kind", f"it is {stated!r}", 'It is "cuda" or "cpu".')
    memory_bytes = table.whole("memory_bytes")
    hardware = Hardware(
        name=path.stem,
        kind=kind,
        title=table.text("title"),
        memory_bytes=memory_bytes,
        reserved_bytes=_reserved(table, memory_bytes),
        bandwidth=table.number("bandwidth"),
        flops=table.flops(),
        providers=table.texts("providers"),
        cores=table.whole("cores") if "cores" in table else None,
        instructions=table.texts("instructions") if "instructions" in table else (),
        capability=table.capability() if "capability" in table else None,
        devices=table.texts("devices") if "devices" in table else (),
        reached=table.reached(),
        interconnect=table.number("interconnect") if "interconnect" in table else None,
        call_seconds=table.number("call_seconds") if "call_seconds" in table else None,
        watts=table.number("watts") if "watts" in table else None,
        price=table.number("price") if "price" in table else None,
        processor=_processor(table.table("processor"), memory_bytes) if "processor" in table else None,
        sources=table.sources(),
    )
    if kind == "cpu" and hardware.processor is not None:
        raise table.error("processor", "a CPU has none beside itself")
    if kind == "cpu" and hardware.capability is not None:
        raise table.error("capability", "a CPU has none")
    table.end(Hardware.__dataclass_fields__.keys() - {"name"})
    return hardware


def _processor(table: Table, memory_bytes: int) -> Processor:
    processor = Processor(
        reserved_bytes=_reserved(table, memory_bytes),
        flops=table.flops(),
        instructions=table.texts("instructions") if "instructions" in table else (),
    )
    table.end(Processor.__dataclass_fields__.keys())
    return processor


def _reserved(table: Table, memory_bytes: int) -> int:
    reserved_bytes = table.whole("reserved_bytes")
    if reserved_bytes >= memory_bytes:
        raise table.error("reserved_bytes", "it leaves no memory", f"memory_bytes is {memory_bytes:,}.")
    return reserved_bytes


# ------------------------------------------------------------------------------------------- this machine


def _cuda(
    *,
    device: str,
    memory_bytes: int,
    used_bytes: int,
    multiprocessors: int,
    capability: tuple[int, int],
    hertz: float = 0.0,
    bandwidth: float = 0.0,
    integrated: bool = False,
) -> Hardware:
    """A CUDA device of this machine: rates from the shipped profile of the same device, else from what PyTorch tells.

    Args:
        device: the driver's name for it, e.g. ``NVIDIA A100-SXM4-40GB``.
        used_bytes: what is in use now, this process's context among it.
        capability: the compute capability.
        hertz: the highest clock of its multiprocessors; 0 where nothing tells, and so of ``bandwidth``.
        integrated: whether it shares its memory with the processor.
    """
    measured = "torch.cuda.mem_get_info"
    for known in map(load, names()):
        # One name can stand for several sizes (RTX 3060: 8 and 12 GB); drivers differ by a few per cent on one size.
        if device in known.devices and abs(memory_bytes / known.memory_bytes - 1) < 0.1:
            return replace(
                known,
                name=AUTO,
                title=device,
                memory_bytes=memory_bytes,
                capability=capability,
                # The context grows as kernels are loaded, so what is used now is not all that will be.
                reserved_bytes=max(used_bytes, known.reserved_bytes),
                sources={
                    **known.sources,
                    "memory_bytes": measured,
                    "reserved_bytes": f"the larger of what is in use now ({measured}) and the profile {known.name}",
                },
            )
    per_clock, generation = rates.of_multiprocessor(capability), f"compute capability {capability[0]}.{capability[1]}"
    told, unlisted = "torch.cuda.get_device_properties", f"because no profile is for {device}"
    derived = hertz and capability in rates.OF_MULTIPROCESSORS
    clock = f"{hertz / 1e9:g} GHz ({told})" if hertz else "1 GHz, which desktop and server cards exceed"
    hertz = hertz or 1e9
    sources = {
        "memory_bytes": measured,
        "reserved_bytes": f"the larger of what is in use now ({measured}) and 616 MiB of CUDA context",
        "bandwidth": f"derived, {unlisted}: twice the clock of its memory times the width of its bus ({told})"
        if bandwidth
        else f"conservative guess, {unlisted}: 100 GB/s",
    }
    for dtype, rate in per_clock.items():
        least = f"{rate} per multiprocessor and clock, the least of {generation if derived else 'all'}"
        counted = f"{least}, x {multiprocessors} x {clock}"
        sources[f"flops.{dtype}"] = f"{'derived' if derived else 'conservative guess'}, {unlisted}: {counted}"
    if not integrated:
        sources["interconnect"] = f"conservative guess, {unlisted}: PCI Express 3.0 with 16 lanes, each way"
    return Hardware(
        name=AUTO,
        kind="cuda",
        title=device,
        memory_bytes=memory_bytes,
        reserved_bytes=max(used_bytes, 616 * 2**20),
        bandwidth=bandwidth or 100e9,
        flops={dtype: rate * multiprocessors * hertz for dtype, rate in per_clock.items()},
        capability=capability,
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        interconnect=None if integrated else INTERCONNECT,
        sources=sources,
    )


def _cpu() -> Hardware:
    memory = machine.memory()
    processor = machine.processor()
    cores = machine.cores()
    hertz, clock_source = machine.clock()
    per_clock = rates.of_core(processor.flags)
    return Hardware(
        name=AUTO,
        kind="cpu",
        title=processor.title,
        memory_bytes=memory.total_bytes,
        reserved_bytes=memory.total_bytes - memory.available_bytes,
        # One 64-bit channel of DDR4-2133 (8 bytes x 2,133 MT/s), or the 32 bits of LPDDR4X-4267 of a Raspberry Pi 5.
        bandwidth=17.07e9,
        flops={dtype: cores * hertz * rate for dtype, rate in per_clock.items()},
        providers=("CPUExecutionProvider",),
        cores=cores,
        instructions=tuple(sorted(processor.flags & {flag for known in rates.OF_CORES.values() for flag in known})),
        sources={
            "memory_bytes": memory.total_source,
            "reserved_bytes": f"total minus what is available now ({memory.available_source})",
            "bandwidth": "conservative guess: one channel of DDR4-2133; the system does not tell its memory's speed",
            "cores": "the cores that this process may run on",
            "instructions": processor.source,
        }
        | {
            f"flops.{dtype}": f"derived: {cores} cores x {hertz / 1e9:g} GHz ({clock_source}) x {rate} per clock"
            for dtype, rate in per_clock.items()
        },
    )
