"""The replayed allocator reserves what PyTorch's rules say, by hand on small cases, and never loses a byte."""

from __future__ import annotations

import random

import pytest
import torch

from edgepeft.allocator import CachingAllocator, OutOfMemory
from edgepeft.trace import Tracker

MiB = 1 << 20


def test_small_requests_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 1), (2, 1000), (3, MiB)])
    assert allocator.reserved_bytes == 2 * MiB
    assert allocator.allocated_bytes == 512 + 1024 + MiB, "in blocks of 512 bytes"


def test_large_requests_share_segments_of_twenty_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 6 * MiB), (2, 6 * MiB), (3, 6 * MiB)])
    assert allocator.reserved_bytes == 20 * MiB
    allocator.run([(4, 6 * MiB)])
    assert allocator.reserved_bytes == 40 * MiB, "the two mebibytes left are too few"


@pytest.mark.parametrize(("asked", "reserved"), [(10 * MiB, 10 * MiB), (10 * MiB + 1, 12 * MiB), (33 * MiB, 34 * MiB)])
def test_the_largest_have_a_segment_of_their_own(asked: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(1, asked)
    assert allocator.reserved_bytes == reserved


def test_a_rest_of_at_most_a_mebibyte_stays_with_a_large_block() -> None:
    """So ``memory_allocated`` is more than tensors take: 19.5 of a segment's 20 MiB are asked for, 20 are given."""
    allocator = CachingAllocator()
    allocator.run([(1, 9 * MiB), (2, 9 * MiB), (3, 3 * MiB // 2)])
    assert allocator.reserved_bytes == 20 * MiB and allocator.allocated_bytes == 20 * MiB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 40 * MiB), (2, 20 * MiB), (-1, 0), (-2, 0), (3, 20 * MiB), (4, 40 * MiB)])
    assert allocator.reserved_bytes == 60 * MiB


def test_of_two_free_blocks_of_a_size_the_one_in_the_later_segment_is_taken() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 40 * MiB), (2, 60 * MiB), (-2, 0), (3, 20 * MiB), (-1, 0), (4, 40 * MiB)])
    assert allocator.reserved_bytes == 100 * MiB
    allocator.run([(0, 0)])
    assert allocator.reserved_bytes == 60 * MiB, "the first segment is free"


def test_a_large_block_that_was_split_is_whole_again_when_its_parts_are_free() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 60 * MiB), (-1, 0), (2, 20 * MiB), (3, 20 * MiB), (-2, 0), (-3, 0), (4, 60 * MiB)])
    assert allocator.reserved_bytes == 60 * MiB


def test_an_emptied_cache_keeps_what_is_in_use() -> None:
    allocator = CachingAllocator()
    allocator.run([(1, 60 * MiB), (-1, 0), (2, 20 * MiB), (3, 30 * MiB), (-3, 0), (0, 0)])
    assert allocator.reserved_bytes == 60 * MiB, "one part of the segment is in use"
    allocator.run([(-2, 0), (0, 0)])
    assert allocator.reserved_bytes == 0 and allocator.peak_reserved_bytes == 60 * MiB


def test_a_full_device_gives_its_cache_back_before_it_fails() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MiB)
    allocator.run([(1, 60 * MiB), (-1, 0), (2, 80 * MiB)])
    assert allocator.reserved_bytes == 80 * MiB
    with pytest.raises(OutOfMemory) as failure:
        allocator.allocate(3, 40 * MiB)
    assert failure.value.requested_bytes == 40 * MiB


def test_random_requests_end_where_they_began() -> None:
    chance = random.Random(0)
    allocator, live = CachingAllocator(), dict[int, int]()
    for uid in range(1, 3000):
        size = int(2 ** chance.uniform(0, 26))
        allocator.allocate(uid, size)
        live[uid] = size
        while live and chance.random() < 0.5:
            freed = chance.choice(list(live))
            del live[freed]
            allocator.free(freed)
        assert sum(live.values()) <= allocator.allocated_bytes <= allocator.reserved_bytes
    for uid in live:
        allocator.free(uid)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_a_traced_step_is_replayed_and_may_be_repeated() -> None:
    tracker = Tracker(cuda=True)
    weight = torch.ones(3 * MiB // 4)
    tracker.label([weight], "weights")
    with tracker.phase("step"):
        kept = weight + 1
        tracker.empty_cache()
        del kept
    once, twice = CachingAllocator(), CachingAllocator()
    once.run(tracker.history("step"))
    twice.run(tracker.history("step", "step"))
    assert once.peak_allocated_bytes == tracker.peaks()["step"].peak_bytes == 6 * MiB
    assert twice.peak_reserved_bytes == once.peak_reserved_bytes == 20 * MiB
