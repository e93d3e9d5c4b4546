"""What a device has: memory, bandwidth, FLOP/s. Read from profiles/*.toml, or found out from this machine."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgepeft import machine
from edgepeft.errors import EdgePeftError, UsageError, nearest

AUTO = "auto"
OPERATIONS = (
    *("matmul", "thin", "attention", "elementwise", "curved", "random", "dequantize", "optimizer", "requantize"),
    "sending",
)


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
    devices: tuple[str, ...] = ()
    """Names under which the CUDA driver reports this device."""
    reached: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The share of the peak that kernels reach, by operation (see OPERATIONS): of FLOP/s in products and attention, of
    bandwidth in the others, of the interconnect in sending. May exceed 1 where caches serve. Absent: what is usual for
    the kind of device."""
    interconnect: float | None = None
    """Bytes per second that a device sends to others like it in one machine while it receives as many; absent: what is
    usual."""
    call_seconds: float | None = None
    """Time that PyTorch takes to issue one operator; absent: what is usual."""
    watts: float | None = None
    """Power drawn while training."""
    price: float | None = None
    """US dollars an hour."""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Where each number is from, by field; of tables by entry, as "flops.bf16" or "reached.matmul"."""

    @property
    def available_bytes(self) -> int:
        """What is left for weights, activations and everything else of ours."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 is native (Ampere and later; CPUs with AVX512-BF16, AMX or Arm's BF16)."""
        return "bf16" in self.flops

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
            )
    return _cpu()


# ---------------------------------------------------------------------------------------------- profiles

_DTYPES = ("fp32", "bf16", "fp16", "int8")
# Lowest and highest believable value. Their main use is to catch GB where bytes are meant, and TFLOPS where FLOP/s are.
_RANGES: dict[str, tuple[float, float]] = {
    "memory_bytes": (2**28, 2**44),
    "reserved_bytes": (0, 2**43),
    "bandwidth": (1e8, 1e14),
    "interconnect": (1e7, 1e14),
    "cores": (1, 2**12),
    "call_seconds": (1e-8, 1e-2),
    "watts": (0.1, 1e5),
    "price": (1e-4, 1e4),
}
_FLOPS_RANGE = (1e8, 1e17)
_SHARE_RANGE = (1e-4, 50)
_UNITS = {
    "bandwidth": "bytes per second",
    "interconnect": "bytes per second",
    "cores": "cores",
    "watts": "watts",
    "price": "US dollars an hour",
}
_UNITS |= {"memory_bytes": "bytes", "reserved_bytes": "bytes", "call_seconds": "seconds"}
_EXAMPLES = "The shipped profiles are examples to start from."


def _folder() -> Path:
    """``profiles`` inside the installed package, or beside the package in a checkout."""
    for folder in (Path(__file__).parent / "profiles", Path(__file__).parents[1] / "profiles"):
        if folder.is_dir():
            return folder
    raise EdgePeftError(
        "The hardware profiles are missing.", "The installation is incomplete.", "Install edgepeft again."
    )


def _read(path: Path) -> Hardware:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The hardware profile {path} cannot be read.", f"{error.strerror}.", "The shipped ones are loaded by name."
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no text, or numbers and nesting beyond all reason
        raise UsageError(f"The hardware profile {path} is not valid TOML.", f"{error}.", _EXAMPLES) from error
    return _Reader(path, table).hardware()


class _Reader:
    """Takes the fields out of one profile's table; the first one that is wrong ends the reading."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self.path = path
        self.table = table

    def hardware(self) -> Hardware:
        kind: Literal["cuda", "cpu"] = "cuda"
        if (stated := self.text("kind")) == "cpu":
            kind = "cpu"
        elif stated != "cuda":
            raise self.error("kind", f"it is {stated!r}", 'It is "cuda" or "cpu".')
        memory_bytes, reserved_bytes = self.whole("memory_bytes"), self.whole("reserved_bytes")
        if reserved_bytes >= memory_bytes:
            raise self.error("reserved_bytes", "it leaves no memory", f"memory_bytes is {memory_bytes:,}.")
        hardware = Hardware(
            name=self.path.stem,
            kind=kind,
            title=self.text("title"),
            memory_bytes=memory_bytes,
            reserved_bytes=reserved_bytes,
            bandwidth=self.number("bandwidth", self.take("bandwidth"), _RANGES["bandwidth"]),
            flops=self.flops(),
            providers=self.texts("providers"),
            cores=self.whole("cores") if "cores" in self.table else None,
            instructions=self.texts("instructions") if "instructions" in self.table else (),
            devices=self.texts("devices") if "devices" in self.table else (),
            reached=self.reached(),
            interconnect=self.optional("interconnect"),
            call_seconds=self.optional("call_seconds"),
            watts=self.optional("watts"),
            price=self.optional("price"),
            sources=self.sources(),
        )
        for key in self.table:
            raise self.error(
                key, "there is no such field", nearest(key, Hardware.__dataclass_fields__.keys() - {"name"})
            )
        return hardware

    def error(self, key: str, fact: str, remedy: str = _EXAMPLES) -> UsageError:
        return UsageError(f"The hardware profile {self.path} has a bad {key}: {fact}.", "", remedy)

    def take(self, key: str) -> Any:
        if key not in self.table:
            raise self.error(key, "it is missing")
        return self.table.pop(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "it is not a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(key, "it is not a list of texts")
        return tuple(value)

    def number(self, key: str, value: Any, limits: tuple[float, float]) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "it is not a number")
        low, high = limits
        if not low <= value <= high:  # also refuses nan
            unit = _UNITS.get(key, "of the peak" if key.startswith("reached") else "FLOP/s")
            raise self.error(key, f"{str(value)[:20]} is out of range", f"It is between {low:g} and {high:g} {unit}.")
        return float(value)

    def whole(self, key: str) -> int:
        value = self.number(key, self.take(key), _RANGES[key])
        if not value.is_integer():
            raise self.error(key, f"{value} is not a whole number")
        return int(value)

    def flops(self) -> dict[str, float]:
        table = self.take("flops")
        if not isinstance(table, dict) or "fp32" not in table:
            raise self.error("flops", "it is not a table with fp32 in it", "For example: flops = { fp32 = 8.1e12 }")
        for dtype in table:
            if dtype not in _DTYPES:
                raise self.error(f"flops.{dtype}", "there is no such dtype", nearest(dtype, _DTYPES))
        return {dtype: self.number(f"flops.{dtype}", value, _FLOPS_RANGE) for dtype, value in table.items()}

    def reached(self) -> dict[str, float]:
        table = self.table.pop("reached", {})
        if not isinstance(table, dict):
            raise self.error("reached", "it is not a table", "For example: reached = { matmul = 0.8 }")
        for operation in table:
            if operation not in OPERATIONS:
                raise self.error(f"reached.{operation}", "there is no such operation", nearest(operation, OPERATIONS))
        return {name: self.number(f"reached.{name}", value, _SHARE_RANGE) for name, value in table.items()}

    def optional(self, key: str) -> float | None:
        return self.number(key, self.table.pop(key), _RANGES[key]) if key in self.table else None

    def sources(self) -> dict[str, str]:
        table = self.table.pop("sources", {})
        if not isinstance(table, dict):
            raise self.error("sources", "it is not a table")
        for group in ("flops", "reached"):  # TOML reads the dotted key flops.fp32 as a table of its own
            if isinstance(entries := table.pop(group, {}), dict):
                table |= {f"{group}.{name}": source for name, source in entries.items()}
        for key, source in table.items():
            if not isinstance(source, str) or not source:
                raise self.error(f"sources.{key}", "it is not a text")
            known = {*_RANGES, "instructions", *(f"flops.{dtype}" for dtype in _DTYPES)}
            if key not in known | {f"reached.{operation}" for operation in OPERATIONS}:
                raise self.error(f"sources.{key}", "there is no such number")
        return table


# ------------------------------------------------------------------------------------------- this machine


def _cuda(
    *, device: str, memory_bytes: int, used_bytes: int, multiprocessors: int, capability: tuple[int, int]
) -> Hardware:
    """A CUDA device of this machine: rates from the shipped profile of the same device, else low figures.

    Args:
        device: the driver's name for it, e.g. ``NVIDIA A100-SXM4-40GB``.
        used_bytes: what is in use now, this process's context among it.
        capability: the compute capability.
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
                # The context grows as kernels are loaded, so what is used now is not all that will be.
                reserved_bytes=max(used_bytes, known.reserved_bytes),
                sources={
                    **known.sources,
                    "memory_bytes": measured,
                    "reserved_bytes": f"the larger of what is in use now ({measured}) and the profile {known.name}",
                },
            )
    # Per multiprocessor and clock: 64 fp32 FMA is the least since Volta; 512 FLOP (fp32 accumulate) and 2,048 int8 OP
    # are the tensor-core rates of GeForce cards, the lowest there are. Desktop and server cards boost well above 1 GHz.
    rates = {"fp32": 128.0}
    if capability >= (7, 0):
        rates["fp16"] = 512.0
    if capability >= (7, 5):
        rates["int8"] = 2048.0
    if capability >= (8, 0):
        rates["bf16"] = 512.0
    unknown = f"conservative guess, because no profile is for {device}"
    return Hardware(
        name=AUTO,
        kind="cuda",
        title=device,
        memory_bytes=memory_bytes,
        reserved_bytes=max(used_bytes, 616 * 2**20),
        bandwidth=100e9,
        flops={dtype: rate * multiprocessors * 1e9 for dtype, rate in rates.items()},
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        sources={
            "memory_bytes": measured,
            "reserved_bytes": f"the larger of what is in use now ({measured}) and 616 MiB of CUDA context",
            "bandwidth": unknown,
        }
        | {f"flops.{dtype}": f"{unknown}: {rate:g} per multiprocessor at 1 GHz" for dtype, rate in rates.items()},
    )


# FLOP (or int8 OP) per core and clock. A multiply-add counts as two. Where the flags do not tell how many units there
# are, the smaller number is taken: one 512-bit unit (server parts often have two), two 128-bit units on Arm.
_PER_CLOCK: dict[str, dict[str, int]] = {
    "fp32": {"sse2": 8, "avx": 16, "fma": 32, "avx512f": 32, "asimd": 16},
    "fp16": {"avx512_fp16": 64, "asimdhp": 32},
    "bf16": {"avx512_bf16": 64, "amx_bf16": 1024, "bf16": 32},
    "int8": {"sse2": 16, "avx2": 64, "avx_vnni": 128, "avx512_vnni": 128, "amx_int8": 2048}
    | {"asimd": 32, "asimddp": 64, "i8mm": 128},
}


def _cpu() -> Hardware:
    memory = machine.memory()
    processor = machine.processor()
    cores = machine.cores()
    hertz, clock_source = machine.clock()
    # FLOP/s = cores x clock x FLOP per clock of the widest instruction set; without SIMD one scalar multiply-add, 2.
    per_clock = {"fp32": 2} | {
        dtype: max(found)
        for dtype, rates in _PER_CLOCK.items()
        if (found := [rate for flag, rate in rates.items() if flag in processor.flags])
    }
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
        instructions=tuple(sorted(processor.flags & {flag for rates in _PER_CLOCK.values() for flag in rates})),
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
