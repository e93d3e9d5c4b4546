"""Training on several devices of this machine: a process for each, which are started, heard and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.hardware import Hardware
from edgepeft.recipe import Recipe

WORKER = "edgepeft.worker"  # named, as it stands on the pipeline, which stands on this
GRACE_SECONDS = 5.0
CTRL_C = 130  # the exit code of what was interrupted
_GO_ON = "What was saved is still there: the same command goes on from the last checkpoint."


@dataclass(frozen=True)
class Part:
    """What one of the processes is told: the run in ``out``, its own number, and the file where all meet."""

    recipe: Recipe
    out: Path
    kind: Literal["cuda", "cpu"]
    rank: int
    meeting: Path


def usable(hardware: Hardware, devices: int) -> Hardware:
    """The hardware, if this machine has as many of it.

    Raises:
        UsageError: it has not. A CPU may be shared by any number of processes.
    """
    if hardware.kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"This machine has no CUDA device, and {hardware.name} is one.",
            "",
            "`edgepeft plan` plans for other hardware; to run here, --set hardware=auto (over --gpu and recipe).",
        )
    if hardware.kind == "cuda" and devices > (there := torch.cuda.device_count()):
        raise UsageError(
            f"This machine has {there} CUDA device{'s' * (there != 1)}, not {devices}.",
            "Each of them takes part in every update.",
            f"Use --gpus {there}.",
        )
    return hardware


@contextlib.contextmanager
def threads(hardware: Hardware, processes: int = 1) -> Iterator[None]:
    """Use the cores of a CPU, or one process's share of them."""
    before = torch.get_num_threads()
    try:
        if hardware.kind == "cpu" and hardware.cores:
            torch.set_num_threads(max(1, min(hardware.cores, os.cpu_count() or 1) // processes))
        yield
    finally:
        torch.set_num_threads(before)  # sums depend on it in their last bits: the caller's results must not change


def train_together(recipe: Recipe, out: Path, kind: Literal["cuda", "cpu"], say: Callable[[str], None]) -> None:
    """Train the run in ``out`` in ``recipe.devices`` processes, each of which does ``pipeline.fit``.

    Ctrl-C is passed on to all of them, so that they end together after a whole step.

    Raises:
        EdgePeftError: what the first to fail raised, or that it ended without a word. The others are ended then.
        KeyboardInterrupt: Ctrl-C, before there was anything to save or a second time.
    """
    processes: dict[Connection, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="edgepeft-") as folder, _passing_on_ctrl_c(processes):
        try:
            for rank in range(recipe.devices):
                ours, processes[ours] = _started()
                ours.send(Part(recipe, out, kind, rank, Path(folder) / "meeting"))
            _listen(processes, say)
        finally:
            _end(processes.values())


def _started() -> tuple[Connection, subprocess.Popen[bytes]]:
    """A process with a connection to it. In a session of its own: it hears of Ctrl-C from here, and once."""
    ours, theirs = Pipe()
    command = [sys.executable, "-P", "-m", WORKER, str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where methods of the user's own may be
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process can answer it
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return ours, process


def _listen(processes: dict[Connection, subprocess.Popen[bytes]], say: Callable[[str], None]) -> None:
    """Say what the processes say and raise what they raise, until all have ended."""
    running = list(processes)
    while running:
        for connection in wait(running):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                running.remove(connection)
                _check(processes[connection].wait(), list(processes).index(connection), len(processes))
                continue
            if isinstance(message, Exception):
                raise message
            say(message)


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Let those that know of the error finish their files; others may be waiting for one that is gone."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


def _check(code: int, rank: int, count: int) -> None:
    if code == CTRL_C:
        raise KeyboardInterrupt
    if code:
        killed = code == -signal.SIGKILL
        raise EdgePeftError(
            f"Process {rank + 1} of {count} ended before its training did.",
            "It was killed, as the system does when memory runs out." if killed else f"Its exit code is {code}.",
            _GO_ON,
        )


def failed(rank: int, count: int, traceback: str) -> EdgePeftError:
    """What is raised here for an error in process ``rank`` that nobody foresaw."""
    return EdgePeftError(f"Process {rank + 1} of {count} failed.", traceback, _GO_ON)


@contextlib.contextmanager
def _passing_on_ctrl_c(processes: dict[Connection, subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in list(processes.values()):
            process.send_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
