"""PyTorch's CUDA caching allocator without a device: what is reserved for what is allocated.

The algorithm and its sizes are those of c10/cuda/CUDACachingAllocator.cpp at its default settings (one stream, no
expandable segments, no limit on splitting). Kernels, the CUDA context and libraries take memory beside it.

Of free blocks of one size the one at the lowest address is taken, so it matters where the driver puts segments: each
below the one before. That is nowhere documented; with rising addresses the replay of public T4 runs reserves up to
10 % less than they did, with falling ones it is within 1 % (``benchmarks/results/plan.md``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

BLOCK = 512  # bytes: every block is a multiple of this (kMinBlockSize)
SMALL = 1 << 20  # up to here a request is small (kSmallSize)
SMALL_SEGMENT = 2 << 20  # what is reserved for small requests (kSmallBuffer)
LARGE_SEGMENT = 20 << 20  # for large ones below LARGE_FROM (kLargeBuffer)
LARGE_FROM = 10 << 20  # from here on a request has a segment of its own (kMinLargeAlloc)
ROUND_LARGE = 2 << 20  # whose size is a multiple of this (kRoundLarge)


class OutOfMemory(Exception):
    """A request that does not fit the capacity even after the cache was emptied; ``requested_bytes`` of it."""

    def __init__(self, requested_bytes: int) -> None:
        super().__init__(requested_bytes)
        self.requested_bytes = requested_bytes


class _Block:
    """A part of a segment; neighbours are the parts before and after it in the same segment."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small = address, size, small
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = False


class CachingAllocator:
    """Serves requests from cached segments, best fit first, and reserves new segments when none fits.

    Args:
        capacity_bytes: most that can be reserved, if there is a limit.

    Attributes:
        reserved_bytes, allocated_bytes: now; ``peak_reserved_bytes``, ``peak_allocated_bytes``: the most so far.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self._address = 1 << 62  # where the last segment is
        self._live: dict[int, _Block] = {}
        # free blocks of either pool, ordered by size and then address
        self._pools: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def run(self, history: Iterable[tuple[int, int]]) -> None:
        """Births (uid, bytes), deaths (-uid, bytes) and ``empty_cache`` (0, 0), in order: ``trace.Tracker.history``.

        Raises:
            OutOfMemory: see ``allocate``.
        """
        allocate, free = self.allocate, self.free
        for uid, size in history:
            if uid > 0:
                allocate(uid, size)
            elif uid < 0:
                free(-uid)
            else:
                self.empty_cache()

    def allocate(self, uid: int, size_bytes: int) -> None:
        """Serve a request, which ``free(uid)`` gives back.

        Raises:
            OutOfMemory: there is no room for it.
        """
        if size_bytes == 0:
            return
        size = -(-size_bytes // BLOCK) * BLOCK
        block = self._cached(size) or self._reserve(size)
        left = block.size - size
        if left and (left >= BLOCK if block.small else left > SMALL):
            self._split(block, size)
        self._live[uid] = block
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes

    def free(self, uid: int) -> None:
        """Give a request back to the cache, joined with free neighbours."""
        block = self._live.pop(uid, None)
        if block is None:
            return
        self.allocated_bytes -= block.size
        if block.before is not None and block.before.free:
            self._take(block.before)
            block = self._join(block.before, block)
        if block.after is not None and block.after.free:
            self._take(block.after)
            block = self._join(block, block.after)
        self._put(block)

    def empty_cache(self) -> None:
        """Give segments that are free as a whole back to the device."""
        for small, pool in self._pools.items():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            self.reserved_bytes -= sum(size for size, _, _ in whole)
            self._pools[small] = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]

    def _cached(self, size: int) -> _Block | None:
        pool = self._pools[size <= SMALL]
        index = bisect.bisect_left(pool, (size, -1))
        if index == len(pool):
            return None
        block = pool.pop(index)[2]
        block.free = False
        return block

    def _reserve(self, size: int) -> _Block:
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < LARGE_FROM:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity_bytes is not None and self.reserved_bytes + segment > self.capacity_bytes:
            self.empty_cache()
            if self.reserved_bytes + segment > self.capacity_bytes:
                raise OutOfMemory(size)
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._address -= segment + BLOCK  # segments are not neighbours
        return _Block(self._address, segment, size <= SMALL)

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.small)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        self._put(rest)

    def _join(self, left: _Block, right: _Block) -> _Block:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        return left

    def _put(self, block: _Block) -> None:
        block.free = True
        bisect.insort(self._pools[block.small], (block.size, block.address, block))

    def _take(self, block: _Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.address))]
        block.free = False
