"""Hardware profiles load, are sane and name their sources; this machine is read as psutil and /proc show it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgepeft import hardware, machine
from edgepeft.errors import UsageError
from edgepeft.hardware import Hardware, detect, load, names
from edgepeft.rates import of_core

REQUIRED = """a100-40gb a100-40gb-pcie a100-80gb a100-80gb-pcie h100-80gb h200-141gb l4-24gb l40s-48gb a10g-24gb t4-16gb
v100-32gb rtx-3060-12gb rtx-3090-24gb rtx-4060-8gb rtx-4080-16gb rtx-4090-24gb rtx-5090-32gb rtx-a6000-48gb
jetson-orin-nano-8gb raspberry-pi-5-8gb cpu-x86-16gb""".split()
PROCESSOR = "{ reserved_bytes = 1e8, flops = { fp32 = 5e9 } }"
GPUS = [name for name in names() if load(name).kind == "cuda"]
GIB = 2**30

GOOD = """
title = "A board"
kind = "cpu"
memory_bytes = 4e9
reserved_bytes = 500_000_000
bandwidth = 10e9
flops = { fp32 = 50e9, int8 = 200e9 }
providers = ["CPUExecutionProvider"]
"""


def numbers(device: Hardware) -> set[str]:
    """The fields of ``device`` that need a source."""
    fields = {"memory_bytes", "reserved_bytes", "bandwidth", *(f"flops.{dtype}" for dtype in device.flops)}
    fields |= {f"reached.{operation}" for operation in device.reached}
    if device.processor:
        fields |= {"processor.reserved_bytes", "processor.instructions"}
        fields |= {f"processor.flops.{dtype}" for dtype in device.processor.flops}
    optional = ("cores", "instructions", "interconnect", "call_seconds", "watts", "price")
    return fields | {name for name in optional if getattr(device, name)}


def test_required_profiles_are_shipped() -> None:
    assert set(REQUIRED) <= set(names())
    assert names() == sorted(names())


@pytest.mark.parametrize("name", names())
def test_profile_is_sane(name: str) -> None:
    device = load(name)
    assert device.name == name
    assert device.sources.keys() == numbers(device)
    assert all(len(source) > 20 for source in device.sources.values())
    assert device.available_bytes == device.memory_bytes - device.reserved_bytes > 0
    assert (device.capability is None) == (device.kind == "cpu")
    # The name states gigabytes of either kind; no driver reports more than is soldered on, nor much less.
    (stated,) = (int(size) for size in re.findall(r"(\d+)gb", name))
    assert 0.91 * stated * GIB < device.memory_bytes <= stated * GIB
    assert device.providers[-1] == "CPUExecutionProvider"
    assert (device.kind == "cuda") == ("CUDAExecutionProvider" in device.providers) == bool(device.devices)
    assert not device.guessed
    assert device.flops["fp32"] < device.flops["int8"]


@pytest.mark.parametrize("name", GPUS)
def test_tensor_core_rates_are_dense(name: str) -> None:
    """NVIDIA's dense int8 rate is twice the 16-bit rate with fp32 accumulate; four times where GeForce halves that.

    Volta's tensor cores have no int8: half as fast.
    """
    device = load(name)
    half = device.flops.get("bf16", device.flops.get("fp16", 0))
    ratio = 0.5 if "V100" in device.title else 4 if "GeForce" in device.title else 2
    assert device.flops["int8"] / half == pytest.approx(ratio, rel=0.01)


def test_native_bf16() -> None:
    without = {name for name in names() if not load(name).bf16}
    assert without == {"t4-16gb", "v100-32gb", "raspberry-pi-5-8gb", "cpu-x86-16gb"}


def test_drivers_name_each_device_once() -> None:
    seen = [(device, load(name).memory_bytes // GIB) for name in names() for device in load(name).devices]
    assert len(seen) == len(set(seen))


def test_cards_on_a_board_and_in_a_slot_are_two() -> None:
    """NVIDIA A100 data sheet: they differ in memory (80 GB), in power, and in what is between several."""
    for size, bandwidth, watts in ((40, 1555e9, 250), (80, 1935e9, 300)):
        board, slot = load(f"a100-{size}gb"), load(f"a100-{size}gb-pcie")
        assert (slot.bandwidth, slot.watts, slot.interconnect) == (bandwidth, watts, 31.5e9)
        assert (board.watts, board.interconnect, board.flops) == (400, 300e9, slot.flops)
        assert all("SXM4" in name for name in board.devices) and all("PCI" in name.upper() for name in slot.devices)
    assert (load("a100-40gb").bandwidth, load("a100-80gb").bandwidth) == (1555e9, 2039e9)


def test_a_processor_s_profile_leaves_a_process_to_the_plan() -> None:
    """``candidate.CPU_PROCESS_BYTES`` has it: the Raspberry Pi's system alone takes half a GiB."""
    assert load("raspberry-pi-5-8gb").reserved_bytes == pytest.approx(0.5 * GIB, rel=0.01)


def test_hardware_can_be_a_cache_key() -> None:
    assert len({load("t4-16gb"), load("t4-16gb"), load("l4-24gb")}) == 2


@pytest.mark.parametrize(
    ("typed", "meant"), [("t4", "t4-16gb"), ("4090", "rtx-4090-24gb"), ("RTX-4090", "rtx-4090-24gb")]
)
def test_a_part_of_a_name_suggests_what_has_it(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        hardware.load(typed)
    assert caught.value.remedy.startswith("Did you mean ") and meant in caught.value.remedy


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load("A100-40")
    assert "'A100-40'" in str(caught.value)
    assert "a100-40gb" in str(caught.value)
    assert caught.value.exit_code == 2


def test_own_profile(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD + '[sources]\nmemory_bytes = "I counted"\nflops.fp32 = "I measured"\n', encoding="utf-8")
    board = load(str(path))
    assert (board.name, board.memory_bytes, board.cores, board.bf16) == ("my-board", 4_000_000_000, None, False)
    assert isinstance(board.memory_bytes, int)
    assert board.sources == {"memory_bytes": "I counted", "flops.fp32": "I measured"}


@pytest.mark.parametrize("name", names())
def test_a_shipped_profile_takes_a_price_as_the_readme_says(name: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    said = "`price = 2.5` (US dollars an hour) at its top"
    assert load(name).price is None and said in (root / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "priced.toml"
    copy.write_text(
        "price = 2.5\n" + (root / "profiles" / f"{name}.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    assert load(str(copy)).price == 2.5


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("memory_bytes = 4e9", "", ["memory_bytes", "missing"]),
        ("memory_bytes = 4e9", "memory_bytes = 4", ["memory_bytes", "4 is out of range", "bytes"]),
        ("memory_bytes = 4e9", 'memory_bytes = "4 GB"', ["memory_bytes", "not a number"]),
        ("memory_bytes = 4e9", "memory_bytes = true", ["memory_bytes", "not a number"]),
        ("memory_bytes = 4e9", "memory_bytes = 4000000000.5", ["memory_bytes", "whole"]),
        ("500_000_000", "5_000_000_000", ["reserved_bytes", "leaves no memory"]),
        ("500_000_000", "-1", ["reserved_bytes", "out of range"]),
        ("bandwidth = 10e9", "bandwidth = 10", ["bandwidth", "out of range", "bytes per second"]),
        ("bandwidth = 10e9", "bandwidth = nan", ["bandwidth", "out of range"]),
        ("bandwidth = 10e9", "bandwidth = 1" + "0" * 400, ["bandwidth", "out of range"]),
        ("bandwidth = 10e9", "bandwith = 10e9", ["bandwidth", "missing"]),
        ("bandwidth = 10e9", "bandwidth = 10e9\nbandwith = 10e9", ["bandwith", "no such field", "bandwidth"]),
        ("fp32 = 50e9", "fp32 = 0.05", ["flops.fp32", "out of range", "FLOP/s"]),
        ("fp32 = 50e9", "bf16 = 50e9", ["flops", "fp32"]),
        ("int8 = 200e9", "int9 = 200e9", ["flops.int9", "int8"]),
        ("flops = { fp32 = 50e9, int8 = 200e9 }", "flops = 50e9", ["flops", "table"]),
        (
            "providers",
            "reached = { matmul = 40 }\nproviders",
            ["reached.matmul", "40 is out of range", "1 of the peak"],
        ),
        ("providers", "reached = { matmuls = 0.5 }\nproviders", ["reached.matmuls", "no such operation", "matmul"]),
        ("providers", "reached = 0.5\nproviders", ["reached", "table"]),
        ("providers", "reached = { thin = { bf17 = 0.5 } }\nproviders", ["reached.thin.bf17", "no such", "thin.bf16"]),
        ("providers", "reached = { thin = { bf16 = 2 } }\nproviders", ["reached.thin.bf16", "2 is out of range"]),
        ("providers", "reached = { curved = { bf16 = 0.5 } }\nproviders", ["reached.curved.bf16", "no such"]),
        ("providers", "reached = { thin = { } }\nproviders", ["reached.thin", "not a number"]),
        ("providers", "reached = { thin = 1.01 }\nproviders", ["reached.thin", "1.01 is out of range"]),
        ("providers", "reached = { attention = 2 }\nproviders", ["reached.attention", "2 is out of range"]),
        ("providers", "reached = { sending = 1.5 }\nproviders", ["reached.sending", "1.5 is out of range"]),
        ("int8 = 200e9", "bf16 = 4.9e9", ["flops.bf16", "4.9e+09 is out of range beside flops.fp32 = 5e+10", "0.1"]),
        ("int8 = 200e9", "int8 = 200e12", ["flops.int8", "out of range beside flops.fp32", "200 times"]),
        ("providers", "processor = { flops = { fp32 = 5e9 } }\nproviders", ["processor.reserved_bytes", "missing"]),
        ("providers", f"processor = {PROCESSOR}\nproviders", ["processor", "a CPU has none"]),
        (
            'kind = "cpu"',
            f'kind = "cuda"\nprocessor = {PROCESSOR[:-2]}, watts = 5 }}',
            ["processor.watts", "no such field"],
        ),
        ("providers", "watts = -1\nproviders", ["watts", "out of range", "watts"]),
        ("providers", "price = 0\nproviders", ["price", "out of range", "US dollars an hour"]),
        ("providers", "call_seconds = 5\nproviders", ["call_seconds", "out of range", "seconds"]),
        ('kind = "cpu"', 'kind = "cpu"\ncapability = "9.0"', ["capability", "a CPU has none"]),
        ('kind = "cpu"', 'kind = "cuda"\ncapability = "sm90"', ["capability", "no compute capability", '"8.0"']),
        ('kind = "cpu"', 'kind = "gpu"', ["kind", "'gpu'", '"cuda" or "cpu"']),
        ('title = "A board"', "title = 5", ["title", "not a text"]),
        ('["CPUExecutionProvider"]', '"CPUExecutionProvider"', ["providers", "list"]),
        ("providers", "cores = 0\nproviders", ["cores", "out of range"]),
        ("providers", "sources = { speed = 'a guess' }\nproviders", ["sources.speed", "no such number"]),
        ("providers", "sources = { bandwidth = 5 }\nproviders", ["sources.bandwidth", "not a text"]),
        ("providers", "sources = 5\nproviders", ["sources", "table"]),
        ('title = "A board"', "title = ", ["not valid TOML", "line 2"]),
    ],
)
def test_malformed_profile_names_file_and_field(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    path = tmp_path / "mine.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load(str(path))
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_unreadable_profiles(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml cannot be read"):
        load(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.toml is not valid TOML"):
        load(str(tmp_path / "binary.toml"))


def test_auto_reads_this_machine() -> None:
    device = load("auto")
    if device.kind == "cuda":
        pytest.skip("the CPU is not what auto reads here")
    memory = psutil.virtual_memory()
    assert device.name == "auto"
    assert device.memory_bytes <= memory.total
    assert 0 < device.available_bytes <= memory.total
    limits = [limit for limit, _ in machine.control_groups()]
    assert device.memory_bytes == min([memory.total, *limits])
    if not any(limit < memory.total for limit in limits):
        # Other processes come and go between the two readings.
        assert device.available_bytes == pytest.approx(memory.available, abs=GIB)
    assert device.cores is not None and 1 <= device.cores <= len(os.sched_getaffinity(0))
    assert device.sources.keys() == numbers(device)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert device.instructions and all(f" {flag}" in flags for flag in device.instructions)
    assert device.bf16 == any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


@pytest.mark.parametrize(("name", "hertz"), [("raspberry-pi-5-8gb", 4 * 2.4e9), ("jetson-orin-nano-8gb", 6 * 1.7e9)])
def test_auto_agrees_with_the_profiles_of_boards(name: str, hertz: float) -> None:
    """A board's processor is derived with the same rates per clock as any CPU that auto finds."""
    board = hardware.runner(name)
    rates = {dtype: hertz * rate for dtype, rate in of_core(board.instructions).items()}
    assert board.flops == pytest.approx(rates)


def cuda(**changes: object) -> Hardware:
    values = {"device": "NVIDIA GeForce RTX 3060", "memory_bytes": 12_600_000_000, "used_bytes": 300_000_000}
    return hardware._cuda(**(values | {"multiprocessors": 28, "capability": (8, 6)} | changes))  # type: ignore[arg-type]


def test_known_cuda_device_takes_its_profile() -> None:
    profile, device = load("rtx-3060-12gb"), cuda()
    assert (device.name, device.title, device.memory_bytes) == ("auto", "NVIDIA GeForce RTX 3060", 12_600_000_000)
    assert (device.flops, device.bandwidth) == (profile.flops, profile.bandwidth)
    assert device.reserved_bytes == profile.reserved_bytes
    assert device.capability == profile.capability == (8, 6) == cuda(device="Another").capability
    assert cuda(used_bytes=5_000_000_000).reserved_bytes == 5_000_000_000
    assert device.sources.keys() == numbers(device) and "mem_get_info" in device.sources["memory_bytes"]


# Multiprocessors, compute capability, clocks in MHz (boost, memory) and width of the memory's bus, as CUDA counts them.
CARDS = {
    **dict.fromkeys(("a100-40gb", "a100-40gb-pcie"), (108, (8, 0), 1410, 1215, 5120)),
    "a100-80gb": (108, (8, 0), 1410, 1593, 5120),
    "a100-80gb-pcie": (108, (8, 0), 1410, 1512, 5120),
    "h100-80gb": (132, (9, 0), 1980, 2619, 5120),
    "h200-141gb": (132, (9, 0), 1980, 3201, 6144),
    "l4-24gb": (58, (8, 9), 2040, 6251, 192),
    "l40s-48gb": (142, (8, 9), 2520, 9001, 384),
    "a10g-24gb": (80, (8, 6), 1710, 6251, 384),
    "t4-16gb": (40, (7, 5), 1590, 5001, 256),
    "v100-32gb": (80, (7, 0), 1530, 877, 4096),
    "rtx-3060-12gb": (28, (8, 6), 1777, 7501, 192),
    "rtx-3090-24gb": (82, (8, 6), 1695, 9751, 384),
    "rtx-4060-8gb": (24, (8, 9), 2460, 8501, 128),
    "rtx-4080-16gb": (76, (8, 9), 2505, 11201, 256),
    "rtx-4090-24gb": (128, (8, 9), 2520, 10501, 384),
    "rtx-5090-32gb": (170, (12, 0), 2407, 14001, 512),
    "rtx-a6000-48gb": (84, (8, 6), 1800, 8001, 384),
    "jetson-orin-nano-8gb": (8, (8, 7), 1020, 3199, 128),
}


@pytest.mark.parametrize("name", GPUS)
def test_unknown_cuda_device_is_underrated(name: str) -> None:
    """The same card under a name that no profile knows must not come out faster than its profile."""
    multiprocessors, capability, *_ = CARDS[name]
    profile = load(name)
    changes = {"multiprocessors": multiprocessors, "capability": capability, "memory_bytes": profile.memory_bytes}
    device = cuda(device="Mystery", **changes)
    assert device.bf16 == profile.bf16
    assert device.bandwidth <= profile.bandwidth
    assert all(device.flops[dtype] <= rate for dtype, rate in profile.flops.items())
    assert "no profile is for Mystery" in device.sources["bandwidth"]
    assert device.sources.keys() == numbers(device)
    assert set(device.guessed) == {"bandwidth", *(f"flops.{dtype}" for dtype in device.flops)}


@pytest.mark.parametrize("name", GPUS)
def test_clocks_that_the_driver_tells_make_an_unknown_device_what_it_is(name: str) -> None:
    """Its memory is known from them; products of a generation with several rates are taken to be the slowest.

    Hopper's data sheet rates tensor cores at 1.83 GHz, which its multiprocessors exceed by 8 per cent.
    """
    multiprocessors, capability, hertz, memory, bits = CARDS[name]
    profile = load(name)
    device = cuda(
        device="Mystery",
        multiprocessors=multiprocessors,
        capability=capability,
        hertz=hertz * 1e6,
        bandwidth=memory * 1e6 * 2 * bits / 8,
    )
    assert device.bandwidth == pytest.approx(profile.bandwidth, rel=0.03)
    for dtype, rate in profile.flops.items():
        assert 0.24 * rate <= device.flops[dtype] <= 1.09 * rate
    assert device.flops["fp32"] == pytest.approx(profile.flops["fp32"], rel=0.02)
    assert not device.guessed and device.sources.keys() == numbers(device)
    assert "torch.cuda.get_device_properties" in device.sources["bandwidth"]
    assert f"compute capability {capability[0]}.{capability[1]}" in device.sources["flops.fp32"]


def test_a_generation_that_no_profile_has_rests_on_a_guess() -> None:
    device = cuda(device="Mystery", capability=(10, 0), hertz=1.9e9, bandwidth=8e12)
    assert device.bandwidth == 8e12
    assert set(device.guessed) == {f"flops.{dtype}" for dtype in device.flops}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch's stubs")
def test_pytorch_tells_clocks_by_these_names() -> None:
    import torch

    stub = Path(torch.__file__).with_name("_C") / "__init__.pyi"
    (fields,) = re.findall(r"class _CudaDeviceProperties:\n((?:    .*\n)+)", stub.read_text(encoding="utf-8"))
    for name in ("clock_rate", "memory_clock_rate", "memory_bus_width", "is_integrated"):
        assert f"    {name}: _int\n" in fields


def test_several_of_a_device_need_something_between_them() -> None:
    assert cuda(device="Mystery").several and not cuda(device="Mystery", integrated=True).several
    assert {name for name in GPUS if not load(name).several} == {"jetson-orin-nano-8gb"}


@pytest.mark.parametrize("name", names())
def test_device_folders_run_on_processors(name: str) -> None:
    device = load(name)
    if device.kind == "cpu":
        assert hardware.runner(name) == device
    elif device.processor is None:
        with pytest.raises(UsageError, match=f"{name} runs no device folder") as caught:
            hardware.runner(name)
        assert "a GPU in a computer" in caught.value.cause and "jetson-orin-nano-8gb" in caught.value.remedy
    else:
        runner = hardware.runner(name)
        assert (runner.name, runner.kind, runner.providers) == (name, "cpu", ("CPUExecutionProvider",))
        assert (runner.memory_bytes, runner.bandwidth) == (device.memory_bytes, device.bandwidth)
        assert runner.available_bytes > device.available_bytes and runner.sources.keys() == numbers(runner)


def test_this_computer_runs_device_folders() -> None:
    assert hardware.runner("auto").kind == "cpu"


def test_same_name_with_other_memory_is_another_device() -> None:
    eight = cuda(memory_bytes=8_200_000_000)
    assert eight.bandwidth < load("rtx-3060-12gb").bandwidth
    assert "no profile is for" in eight.sources["bandwidth"]


def test_import_stays_light() -> None:
    code = "import sys, edgepeft.hardware; print({'torch', 'numpy', 'psutil', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_detect_is_what_auto_means() -> None:
    assert detect().title == load("auto").title
