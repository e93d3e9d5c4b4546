"""A GPU's memory as the allocator counts it: most of a phase, and most ever, though its peaks are forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edgepeft import events, reserved, watch

GPU = torch.device("cuda", 0)


class Allocator:
    """Stands for torch's, which caches all that it ever reserved until it is told not to."""

    def __init__(self) -> None:
        self.held = self.most_held = self.kept = self.most_kept = 0

    def hold(self, held: int) -> None:
        self.held, self.kept = held, max(self.kept, held)
        self.most_held, self.most_kept = max(self.most_held, held), max(self.most_kept, self.kept)

    def release(self) -> None:
        self.kept = self.held

    def forget(self) -> None:
        self.most_held, self.most_kept = self.held, self.kept


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    made = Allocator()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: made.forget())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: made.most_held)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: made.most_kept)
    monkeypatch.setattr(reserved, "_reserved", [0])
    yield made
    assert not reserved._allocated


class OnGpu(nn.Module):
    """A model that says it is there."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=GPU)


def test_watching_phases_does_not_forget_the_most_that_was_reserved(gpu: Allocator) -> None:
    model, phases = OnGpu(), dict[str, int]()
    with watch.rise(phases, "loading", "cuda"):
        gpu.hold(900)
        gpu.hold(100)
    gpu.release()
    for most in (300, 200):
        with watch.peak(phases, "update", model):
            gpu.hold(most)
            gpu.hold(100)
        gpu.release()
    assert phases == {"loading": 900, "update": 300}
    assert torch.cuda.max_memory_reserved() < events.most_bytes(GPU) == 900
    gpu.hold(1000)
    assert events.most_bytes(GPU) == 1000


def test_a_phase_in_another_is_part_of_it(gpu: Allocator) -> None:
    """What was compared after a merge is loaded while its reloading is watched."""
    phases: dict[str, int] = {}
    with watch.rise(phases, "exporting", "cuda"):
        gpu.hold(500)
        gpu.hold(50)
        with watch.rise(phases, "loading", "cuda"):
            gpu.hold(80)
    assert phases == {"exporting": 500, "loading": 80}


def test_a_phase_that_fails_ends(gpu: Allocator) -> None:
    phases: dict[str, int] = {}
    with pytest.raises(ZeroDivisionError), watch.rise(phases, "exporting", "cuda"):
        raise ZeroDivisionError
    assert not phases
