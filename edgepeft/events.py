"""What happens while a run trains: events.jsonl, a progress bar and the machine's memory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgepeft import reserved, resident
from edgepeft.files import refusing_full_disk, write_text


class EventLog:
    """Appends one JSON object a line; every line is on its way to the disk when ``write`` returns.

    Args:
        path: of events.jsonl; None if nothing is to be kept.
        resumed_at: the step a resumed run goes on from; events of later steps will happen again and are removed.
    """

    def __init__(self, path: Path | None, resumed_at: int | None = None) -> None:
        self._file = None
        if path is None:
            return
        self._path = path
        kept = [] if resumed_at is None else [event for event in read(path) if event.get("step", 0) <= resumed_at]
        write_text(path, "".join(json.dumps(event) + "\n" for event in kept if event["event"] != "end"))
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **details: Any) -> None:
        """Append an event."""
        if self._file is not None:
            line = json.dumps({"event": event, "step": step, "time": round(time.time(), 3), **details})
            with refusing_full_disk(self._path):
                self._file.write(line + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with refusing_full_disk(self._path):  # what could not be written is tried again
                self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file; a last line cut short by a kill is left out."""
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


@contextlib.contextmanager
def progress_bar(total: int, done: int, *, shown: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar for ``total`` updates, of which ``done`` are; it advances by one when called with an update's event."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s  {task.fields[memory]:.2f} GiB"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:  # stdout is for results alone
        task = bar.add_task("train", total=total, completed=done, loss=0.0, speed=0.0, memory=0.0)

        def advance(event: Mapping[str, Any]) -> None:
            speed, memory = event["tokens_per_second"], event["memory_bytes"] / 2**30
            bar.update(task, advance=1, loss=event["loss"], speed=speed, memory=memory)

        yield advance


def most_bytes(device: torch.device) -> int:
    """The most that this process held so far: reserved by the allocator on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return reserved.peak_bytes(device)
    return resident.peak_bytes()


def memory_bytes(device: torch.device) -> int:
    """What this process holds now: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
