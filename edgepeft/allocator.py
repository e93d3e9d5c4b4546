"""PyTorch's CUDA caching allocator without a device: what is reserved for what is allocated.

The algorithm and its sizes are those of c10/cuda/CUDACachingAllocator.cpp at its default settings (one stream, no
expandable segments, no limit on splitting). Kernels, the CUDA context and libraries take memory beside it.

Of free blocks of one size the one at the lowest address is taken, so it matters where the driver puts segments: each
below the one before. That is nowhere documented; with rising addresses the replay of public T4 runs reserves up to
10 % less than they did, with falling ones it is within 1 % (``benchmarks/results/plan.md``).
"""

from __future__ import annotations

from bisect import bisect_left, insort
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

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    address: int
    size: int
    pool: _Pool
    before: _Block | None
    after: _Block | None
    free: bool


_Pool = list[tuple[int, int, _Block]]
"""Free blocks of segments of one sort, ordered by size and then address."""


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
        self._small: _Pool = []
        self._large: _Pool = []

    def run(self, history: Iterable[tuple[int, int]]) -> None:
        """Births (uid, bytes), deaths (-uid, bytes) and ``empty_cache`` (0, 0), in order: ``trace.Tracker.history``.

        One loop without calls, as a plan of many methods replays tens of millions of these.

        Raises:
            OutOfMemory: see ``allocate``.
        """
        live, small, large = self._live, self._small, self._large
        allocated, peak = self.allocated_bytes, self.peak_allocated_bytes
        try:
            for uid, asked in history:
                if uid > 0:
                    if not asked:
                        continue
                    size = (asked + BLOCK - 1) & -BLOCK
                    pool = small if size <= SMALL else large
                    index = bisect_left(pool, (size, -1))
                    if index < len(pool):
                        block = pool.pop(index)[2]
                        block.free = False
                    else:
                        block = self._reserve(size, pool)
                    left = block.size - size
                    if left > SMALL or (left and pool is small):  # split
                        rest, after = _Block(), block.after
                        rest.address, rest.size, rest.pool = block.address + size, left, pool
                        rest.before, rest.after, rest.free = block, after, True
                        block.after, block.size = rest, size
                        if after is not None:
                            after.before = rest
                        insort(pool, (left, rest.address, rest))
                    live[uid] = block
                    allocated += block.size
                    if allocated > peak:
                        peak = allocated
                elif uid < 0:
                    freed = live.pop(-uid, None)
                    if freed is None:
                        continue
                    block, pool, before, after = freed, freed.pool, freed.before, freed.after
                    allocated -= block.size
                    if before is not None and before.free:  # join with the neighbours that are free
                        del pool[bisect_left(pool, (before.size, before.address))]
                        before.size += block.size
                        before.after = after
                        if after is not None:
                            after.before = before
                        block = before
                    if after is not None and after.free:
                        del pool[bisect_left(pool, (after.size, after.address))]
                        block.size += after.size
                        block.after = beyond = after.after
                        if beyond is not None:
                            beyond.before = block
                    block.free = True
                    insort(pool, (block.size, block.address, block))
                else:
                    self.empty_cache()
        finally:
            self.allocated_bytes, self.peak_allocated_bytes = allocated, peak

    def allocate(self, uid: int, size_bytes: int) -> None:
        """Serve a request, which ``free(uid)`` gives back.

        Raises:
            OutOfMemory: there is no room for it.
        """
        self.run([(uid, size_bytes)])

    def free(self, uid: int) -> None:
        """Give a request back to the cache, joined with free neighbours."""
        self.run([(-uid, 0)])

    def empty_cache(self) -> None:
        """Give segments that are free as a whole back to the device."""
        for pool in (self._small, self._large):
            kept = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]
            self.reserved_bytes -= sum(size for size, _, _ in pool) - sum(size for size, _, _ in kept)
            pool[:] = kept

    def _reserve(self, size: int, pool: _Pool) -> _Block:
        """A new segment as one block."""
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
        block = _Block()
        block.address, block.size, block.pool = self._address, segment, pool
        block.before, block.after, block.free = None, None, False
        return block
