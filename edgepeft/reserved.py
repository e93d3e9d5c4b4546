"""What this process has and had of a GPU's memory, as torch's allocator counts it. Imports nothing of edgepeft.

A process uses one GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_reserved = [0]  # the most before the allocator's peaks were last forgotten
_allocated: list[int] = []  # the same of tensors, since each ``allocated`` that is open began


def peak_bytes(device: torch.device) -> int:
    """The most memory that the allocator ever reserved."""
    return max(*_reserved, torch.cuda.max_memory_reserved(device))


@contextlib.contextmanager
def allocated(device: torch.device | None = None) -> Iterator[list[int]]:
    """How many bytes tensors had at most inside, which is in the list afterwards. One in another is part of it.

    Args:
        device: the current one when not given.
    """
    found: list[int] = []
    # torch forgets all peaks at once, those that others are after too.
    _reserved[0] = max(_reserved[0], torch.cuda.max_memory_reserved(device))
    _allocated[:] = [max(peak, torch.cuda.max_memory_allocated(device)) for peak in _allocated]
    torch.cuda.reset_peak_memory_stats(device)
    _allocated.append(0)
    try:
        yield found
    finally:
        found.append(max(_allocated.pop(), torch.cuda.max_memory_allocated(device)))
