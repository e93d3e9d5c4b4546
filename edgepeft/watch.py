"""The most that each phase of real work holds: what the phases of a plan are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping

import torch
from torch import nn

from edgepeft import reserved, resident, shards
from edgepeft.trace import Tracker


@contextlib.contextmanager
def peak(
    phases: MutableMapping[str, int], name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Note in ``phases`` the most bytes of tensors that were held inside, if it is more than was noted before.

    On CUDA the allocator counts; elsewhere every operator is followed, which costs time, so that a phase which is
    repeated is watched a few times only. Threads other than this one are not seen there, nor is a sharded model, whose
    storages are emptied and filled again.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        with reserved.allocated(device) as held:
            yield
        [found] = held
    elif shards.is_divided(model):
        yield
        return
    else:
        tracker = Tracker(cuda=False)
        tracker.label([*model.parameters(), *model.buffers()], "weights")
        tracker.label([p.grad for p in model.parameters() if p.grad is not None], "gradients")
        if optimizer is not None:
            tracker.label_optimizer(optimizer)
        with tracker.phase(name):
            yield
        found = tracker.peaks()[name].peak_bytes
    phases[name] = max(phases.get(name, 0), found)


@contextlib.contextmanager
def rise(phases: MutableMapping[str, int], name: str, device: str) -> Iterator[None]:
    """Note in ``phases`` what loading or exporting a model takes, where operators do not tell.

    Its weights are read by other threads and its graph belongs to another library. On a CPU it is by how much the
    process's resident memory rises, where the system tells: with libraries that are loaded on the way, and with mapped
    weights as if all were read.
    """
    with reserved.allocated() if device == "cuda" else resident.rise() as found:
        yield
    if found:
        phases[name] = max(phases.get(name, 0), *found)
