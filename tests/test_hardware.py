"""Hardware profiles load, are sane and name their sources; this machine is read as psutil and /proc show it."""

from __future__ import annotations

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

REQUIRED = """a100-40gb a100-40gb-pcie a100-80gb a100-80gb-pcie h100-80gb h200-141gb l4-24gb l40s-48gb a10g-24gb t4-16gb
v100-32gb rtx-3060-12gb rtx-3090-24gb rtx-4060-8gb rtx-4080-16gb rtx-4090-24gb rtx-5090-32gb rtx-a6000-48gb
jetson-orin-nano-8gb raspberry-pi-5-8gb cpu-x86-16gb""".split()
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
    # The name states gigabytes of either kind; no driver reports more than is soldered on, nor much less.
    (stated,) = (int(size) for size in re.findall(r"(\d+)gb", name))
    assert 0.91 * stated * GIB < device.memory_bytes <= stated * GIB
    assert device.providers[-1] == "CPUExecutionProvider"
    assert (device.kind == "cuda") == ("CUDAExecutionProvider" in device.providers) == bool(device.devices)
    assert device.flops["fp32"] < device.flops["int8"]


@pytest.mark.parametrize("name", [name for name in names() if load(name).kind == "cuda"])
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
        ("providers", "reached = { matmul = 99 }\nproviders", ["reached.matmul", "out of range", "of the peak"]),
        ("providers", "reached = { matmuls = 0.5 }\nproviders", ["reached.matmuls", "no such operation", "matmul"]),
        ("providers", "reached = 0.5\nproviders", ["reached", "table"]),
        ("providers", "watts = -1\nproviders", ["watts", "out of range", "watts"]),
        ("providers", "price = 0\nproviders", ["price", "out of range", "US dollars an hour"]),
        ("providers", "call_seconds = 5\nproviders", ["call_seconds", "out of range", "seconds"]),
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


def test_auto_agrees_with_the_raspberry_pi_profile() -> None:
    """The board's profile is derived with the same rates per clock as any CPU that auto finds."""
    board = load("raspberry-pi-5-8gb")
    for dtype, rates in hardware._PER_CLOCK.items():
        found = [rates[flag] for flag in board.instructions if flag in rates]
        assert board.flops.get(dtype) == (pytest.approx(4 * 2.4e9 * max(found)) if found else None)


def cuda(**changes: object) -> Hardware:
    values = {"device": "NVIDIA GeForce RTX 3060", "memory_bytes": 12_600_000_000, "used_bytes": 300_000_000}
    return hardware._cuda(**(values | {"multiprocessors": 28, "capability": (8, 6)} | changes))  # type: ignore[arg-type]


def test_known_cuda_device_takes_its_profile() -> None:
    profile, device = load("rtx-3060-12gb"), cuda()
    assert (device.name, device.title, device.memory_bytes) == ("auto", "NVIDIA GeForce RTX 3060", 12_600_000_000)
    assert (device.flops, device.bandwidth) == (profile.flops, profile.bandwidth)
    assert device.reserved_bytes == profile.reserved_bytes
    assert cuda(used_bytes=5_000_000_000).reserved_bytes == 5_000_000_000
    assert device.sources.keys() == numbers(device) and "mem_get_info" in device.sources["memory_bytes"]


@pytest.mark.parametrize("name", [name for name in names() if load(name).kind == "cuda"])
def test_unknown_cuda_device_is_underrated(name: str) -> None:
    """The same card under a name that no profile knows must not come out faster than its profile."""
    multiprocessors = {"a100": 108, "h100": 132, "l4": 58, "t4": 40, "3060": 28, "3090": 82, "4060": 24, "4090": 128}
    count = next((count for part, count in (multiprocessors | {"5090": 170}).items() if part in name.split("-")), 8)
    profile = load(name)
    capability = (8, 0) if profile.bf16 else (7, 5)
    device = cuda(device="Mystery", memory_bytes=profile.memory_bytes, multiprocessors=count, capability=capability)
    assert device.bf16 == profile.bf16
    assert device.bandwidth <= profile.bandwidth
    assert all(device.flops[dtype] <= rate for dtype, rate in profile.flops.items())
    assert "no profile is for Mystery" in device.sources["bandwidth"]
    assert device.sources.keys() == numbers(device)


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
