"""What a process holds after large blocks are freed between small ones that stay, as training and packing do."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")

# Half of the large blocks are freed, each beside a small one that stays.
HOLES = """
import contextlib, sys
import psutil, torch
from edgepeft import heap

large = []
def make():
    for number in range(80):
        large.append((torch.ones(2 << 20, dtype=torch.uint8), torch.ones(100)))
    for number in range(0, 80, 2):
        large[number] = large[number][1]
    return psutil.Process().memory_info().rss

with heap.small():
    pass
before = psutil.Process().memory_info().rss
with getattr(heap, sys.argv[1])() if sys.argv[1] != "none" else contextlib.nullcontext():
    inside = make()
print((inside - before) >> 20, (psutil.Process().memory_info().rss - before) >> 20)
"""


def held(where: str) -> tuple[int, int]:
    """MiB more inside, and afterwards."""
    command = [sys.executable, "-c", HOLES, where]
    inside, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(inside), int(after)


def test_large_blocks_are_given_back_unless_memory_is_ample() -> None:
    for where in ("none", "small"):  # after loading, and while it lasts
        inside, after = held(where)
        assert 75 <= inside <= 100 and 75 <= after <= 100, "half of 160"
    inside, after = held("ample")
    assert inside >= 150 and after <= 100, "kept for the next step, and given back after the last"


def test_what_a_user_wants_of_kernels_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepeft import heap

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    with heap.small():
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    with heap.small():
        assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == heap._KERNELS
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
