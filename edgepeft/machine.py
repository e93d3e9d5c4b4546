"""What the operating system says about this machine: memory, cores, clock, processor. Imports nothing of edgepeft."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMBERSHIP, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory this process can have in all, and what it can still get now, each with where the number is from."""

    total_bytes: int
    available_bytes: int
    total_source: str
    available_source: str


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The processor's name, and its instruction sets as /proc/cpuinfo names them."""

    title: str
    flags: frozenset[str]
    source: str


def memory() -> Memory:
    """The machine's memory, or the control group's (a container's, a batch job's) where that is less."""
    import psutil

    machine = psutil.virtual_memory()
    total, total_source = int(machine.total), "psutil: total memory"
    available, available_source = int(machine.available), "psutil: available memory"
    for limit, used in control_groups():
        if limit < total:
            total, total_source = limit, "the memory limit of this process's control group"
        if limit - used < available:
            available, available_source = max(limit - used, 0), "what this process's control group has left"
    return Memory(
        total_bytes=total, available_bytes=available, total_source=total_source, available_source=available_source
    )


def control_groups(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each Linux control group this process is in, for those that limit memory.

    Version 2 and version 1. What the page cache could give back does not count as used.
    """
    for folder, second in _groups("memory", membership, root):
        limit_name, used_name, cache_name = (
            ("memory.max", "memory.current", "inactive_file")
            if second
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        try:
            limit = (folder / limit_name).read_text(encoding="utf-8").strip()
            used = int((folder / used_name).read_text(encoding="utf-8"))
            rows = [row.split() for row in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()]
        except OSError:
            continue  # the root has no limit of its own; a level outside the container is not there
        if limit.isdigit():  # version 2 says "max" where there is none
            cache = sum(int(row[1]) for row in rows if row[0] == cache_name)
            yield int(limit), max(used - cache, 0)


def quotas(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> Iterator[float]:
    """Processors' worth of time that each Linux control group this process is in may use, for those that limit it."""
    for folder, second in _groups("cpu", membership, root):
        names = ("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            text = " ".join((folder / name).read_text(encoding="utf-8") for name in names)
        except OSError:
            continue
        quota, period = text.split()
        if quota.isdigit():  # else it is "max", or -1 in version 1
            yield int(quota) / int(period)


def _groups(controller: str, membership: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups, and whether each is of version 2.

    Groups nest, and a container may see only its own group at the root, so every level of the path is tried.
    """
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        own = base / group.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(base):
                break
            yield folder, not controllers


def processors() -> int:
    """Logical processors this process may run on and has the time of.

    A container may run on all processors of its host, and is stopped when it has used the time of some.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *map(int, quotas())]))


def cores() -> int:
    """Processor cores this process may use in threads, as many as ``OMP_NUM_THREADS`` tells PyTorch and others at most.

    Two threads of one core share its arithmetic units and count once.
    """
    import psutil

    usable = processors()
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number for each level of nesting
    told_cores = int(told) if told.isdigit() and int(told) else usable
    return min(usable, psutil.cpu_count(logical=False) or usable, told_cores)


def clock() -> tuple[float, str]:
    """The processor's clock in Hz and where the number is from: the highest where the system tells it."""
    import psutil

    reported = psutil.cpu_freq()  # None on some machines; its maximum is 0 on most virtual ones
    if reported is not None and reported.max:
        return reported.max * 1e6, "psutil: maximum"
    if reported is not None and reported.current:
        return reported.current * 1e6, "psutil: current"
    return 2e9, "guess, because the system does not tell"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The first processor of ``cpuinfo``; elsewhere than on Linux what every 64-bit one of its family has."""
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    title = fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("Features")  # x86 and Arm
    if flags:
        return Processor(title=title, flags=frozenset(flags.split()), source=str(cpuinfo))
    family = {"arm64": "asimd", "aarch64": "asimd", "x86_64": "sse2", "amd64": "sse2"}
    flag = family.get(platform.machine().lower())
    return Processor(title=title, flags=frozenset([flag] if flag else []), source="platform.machine")
