"""The C library's heap: loading leaves it without holes, so that what a process takes hangs on its tensors alone."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 32 << 20  # what glibc raises its threshold to by itself, as large blocks are freed


@contextlib.contextmanager
def without_holes() -> Iterator[None]:
    """Give back to the system what is freed meanwhile; afterwards the heap works as it does after some large frees.

    Packing a model frees temporaries between small pieces that stay: glibc kept 240 to 460 MiB of SmolLM2-135M's heap
    from run to run, for 60 MiB of packed weights. Large blocks are mapped one by one meanwhile; not in training, where
    every update would map them anew. Nothing happens where the C library is not glibc.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc
        yield
        return
    mallopt(_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        malloc_trim(0)
