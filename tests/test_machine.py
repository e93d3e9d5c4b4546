"""Control groups, cores and processors, read from files as Linux writes them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import pytest

from edgepeft import machine

PI = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU part\t: 0xd0b

processor\t: 1
Features\t: fp

Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz
flags\t\t: fpu sse2 avx fma avx2 avx512f avx512_vnni
bugs\t\t: spectre_v1
"""


@pytest.mark.parametrize(
    ("text", "title", "has", "lacks"),
    [
        (PI, "Raspberry Pi 5 Model B Rev 1.0", "asimddp", "Model"),
        (XEON, "Intel(R) Xeon(R) Processor @ 2.50GHz", "avx512_vnni", "spectre_v1"),
    ],
)
def test_processor(tmp_path: Path, text: str, title: str, has: str, lacks: str) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    found = machine.processor(tmp_path / "cpuinfo")
    assert found.title == title
    assert has in found.flags and lacks not in found.flags
    assert found.source == str(tmp_path / "cpuinfo")


def test_processor_without_cpuinfo(tmp_path: Path) -> None:
    found = machine.processor(tmp_path / "absent")
    assert found.source == "platform.machine"
    assert found.flags <= machine.processor().flags or not Path("/proc/cpuinfo").is_file()
    assert found.flags or platform.machine() not in ("x86_64", "aarch64", "arm64", "AMD64")


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def test_control_groups_version_2(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    write_group(root, {"memory.stat": "anon 1"})  # the root group has no limit file
    stat = "anon 2000\ninactive_file 1000\nactive_file 500"
    write_group(root / "slice/job", {"memory.max": "8000", "memory.current": "3000", "memory.stat": stat})
    write_group(root / "slice", {"memory.max": "max", "memory.current": "5000", "memory.stat": stat})
    membership.write_text("0::/slice/job\n", encoding="utf-8")
    assert list(machine.control_groups(membership, root)) == [(8000, 2000)]
    write_group(root / "slice", {"memory.max": "7000"})
    assert list(machine.control_groups(membership, root)) == [(8000, 2000), (7000, 4000)]


def test_control_groups_version_1_in_a_container(tmp_path: Path) -> None:
    """The path is the host's, and only the mount's root is there."""
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    files = {"memory.limit_in_bytes": "6000", "memory.usage_in_bytes": "900"}
    write_group(root / "memory", files | {"memory.stat": "inactive_file 5\ntotal_inactive_file 100"})
    membership.write_text("3:cpu,cpuacct:/\n2:memory:/docker/0123\n1:name=systemd:/\n0::/\n", encoding="utf-8")
    assert list(machine.control_groups(membership, root)) == [(6000, 800)]


def test_control_groups_elsewhere_than_on_linux(tmp_path: Path) -> None:
    assert list(machine.control_groups(tmp_path / "absent", tmp_path)) == []


def test_quotas_of_processor_time(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    write_group(root / "slice/job", {"cpu.max": "250000 100000"})
    write_group(root / "slice", {"cpu.max": "max 100000"})
    membership.write_text("0::/slice/job\n", encoding="utf-8")
    assert list(machine.quotas(membership, root)) == [2.5]
    write_group(root / "cpu", {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "50000"})
    write_group(root / "cpu/free", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    membership.write_text("3:cpuacct,cpu:/free\n2:memory:/\n", encoding="utf-8")
    assert list(machine.quotas(membership, root)) == [3.0]


@pytest.mark.parametrize(
    ("quota", "told", "expected"), [(64.0, "", 4), (3.2, "all", 3), (0.5, "", 1), (64.0, "2,1", 2), (3.0, "0", 3)]
)
def test_cores_respect_quotas_and_what_was_told(
    monkeypatch: pytest.MonkeyPatch, quota: float, told: str, expected: int
) -> None:
    monkeypatch.setattr(machine, "quotas", lambda: iter([quota]))
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    assert machine.cores() == expected


def test_memory_is_never_more_than_the_machine_has() -> None:
    memory = machine.memory()
    assert 0 <= memory.available_bytes <= memory.total_bytes <= psutil.virtual_memory().total


def test_clock_is_a_clock() -> None:
    hertz, source = machine.clock()
    assert 1e8 < hertz < 1e10 and source


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processor affinity on this system")
def test_cores_respect_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= machine.cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
