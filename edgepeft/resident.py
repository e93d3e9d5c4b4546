"""What this process has and had resident in memory, as the operating system counts it. Imports nothing of edgepeft."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

_STATUS, _CLEAR, _MAPPED = (Path("/proc/self") / name for name in ("status", "clear_refs", "smaps"))
_RESET_PEAK = "5"  # what proc(5) says to write
_peaks = [0]  # the most that was resident: ever, and since each ``rise`` that is open began


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return max(_peaks[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@contextlib.contextmanager
def rise() -> Iterator[list[int]]:
    """By how many bytes resident memory rose at most inside, which is in the list afterwards.

    Threads that are not Python's are counted, and weights that are still mapped at the end as if they were read, which
    whoever uses them does. The list stays empty where the system cannot forget a peak, which Linux can.
    """
    found: list[int] = []
    if not _forget():
        yield found
        return
    before, unread = _kernel("VmRSS"), _unread_bytes()
    _peaks.append(before)
    try:
        yield found
    finally:
        _forget()
        found.append(_peaks.pop() - before + _unread_bytes() - unread)


def _forget() -> bool:
    """Keep the kernel's peak in all of ``_peaks`` and let it begin a new one; whether it can."""
    try:
        highest = _kernel("VmHWM")
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except (OSError, KeyError):
        return False
    _peaks[:] = [max(peak, highest) for peak in _peaks]
    return True


def _kernel(name: str) -> int:
    """A size in bytes that /proc tells of this process."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


def _unread_bytes() -> int:
    """What of the mapped files of weights is not resident, which it is once it is read."""
    unread, of_weights = 0, False
    with _MAPPED.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):  # a mapping begins: its addresses, ..., its file
                of_weights = line.rstrip().endswith(".safetensors")
            elif of_weights and name in ("Size:", "Rss:"):
                unread += (1 if name == "Size:" else -1) * int(rest.split()[0]) * 1024
    return unread
