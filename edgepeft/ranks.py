"""Processes that train one model together, each on its own part of the data and on a device of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")
PATIENCE = timedelta(hours=2)  # of one rank with another, which may be writing a large checkpoint


@dataclass(frozen=True)
class Ranks:
    """One of ``count`` processes, number ``rank`` from 0.

    What sends must be called by all of them, in the same order. Alone, nothing is sent.

    Attributes:
        sharded: whether each holds a part of the model (FSDP, ``shards``), and not a copy of it (DDP).
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and speaks to the user."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of what all ranks have: neighbours, as many as the others' or one more or less.

        Of few it is the first rank that has some. Neighbours, because the first two microbatches of an update are where
        the longest is put, on top of the gradients of another (``train``).
        """
        first, end = (-(-len(items) * rank // self.count) for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def idle(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this rank runs beside ``mine``, for nothing: where the model is sharded, all take part in each pass."""
        most = -(-len(items) // self.count) if self.sharded else 0
        return [items[0]] * (most - len(self.mine(items)))

    @torch.no_grad()
    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the sum of all ranks' in place: nothing as large as all of them together is made."""
        if self.count > 1:
            for tensor in tensors:
                with _whole(tensor) as whole:
                    dist.all_reduce(whole)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients. Where only other ranks have one it is taken to be zero; where none has, none is made.

        Those of a sharded model are summed in its backward pass.
        """
        if self.count > 1 and not self.sharded:
            there = self.largest([parameter.grad is not None for parameter in parameters])
            reached = [parameter for parameter, is_there in zip(parameters, there, strict=True) if is_there]
            for parameter in reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.sum(parameter.grad for parameter in reached if parameter.grad is not None)

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Let every rank have the first one's tensors."""
        if self.count > 1:
            for tensor in tensors:
                with _whole(tensor) as whole:
                    dist.broadcast(whole, 0)

    def largest(self, values: Sequence[int]) -> list[int]:
        """Of each value the largest that any rank has."""
        if self.count == 1 or not values:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        largest: list[int] = found.tolist()
        return largest

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.largest([0])

    @contextlib.contextmanager
    def drawing_apart(self, *numbers: int) -> Iterator[None]:
        """Draw random numbers that follow from ``numbers`` and the rank; afterwards all ranks go on with the same ones.

        So dropout differs between ranks, what is drawn for an update does not, and no rank's generator needs saving.
        """
        if self.count == 1:
            yield
            return
        seed = np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(seed[0] >> np.uint64(1)))
            yield

    def drawing_for_parts(self, *numbers: int) -> contextlib.AbstractContextManager[None]:
        """The same where each draws for its own part of a sharded model, which need not be as large as the others'."""
        return self.drawing_apart(*numbers) if self.sharded else contextlib.nullcontext()


ALONE = Ranks()


@contextlib.contextmanager
def joined(rank: int, count: int, kind: str, meeting: Path, *, sharded: bool = False) -> Iterator[Ranks]:
    """Meet the other ranks: over NCCL on ``cuda``, each on the device of its number, else over gloo.

    Args:
        meeting: a file that does not exist yet, on a disk that all of them see.
    """
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it looks for the host's name, which may not be known
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=dist.FileStore(str(meeting), count),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    yield Ranks(rank, count, device, sharded)
    dist.destroy_process_group()  # after an error the others may never come: then the process just ends


@contextlib.contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as it can be sent; what is done to it is done to ``tensor``."""
    whole = tensor.detach().contiguous()
    yield whole
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)
