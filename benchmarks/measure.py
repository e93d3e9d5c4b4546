"""What is measured around a step, by the same code for both sides: seconds in one process, tensor bytes in another."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import sys
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Measure(Protocol):
    """Something that watches training steps."""

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        """The batch is there; forward comes next."""

    def end(self, optimizer: Any) -> None:
        """The update is done and its gradients are freed."""

    def result(self) -> dict[str, Any]:
        """What was found, for JSON."""


class Seconds:
    """Wall-clock and processor seconds of every step, and the process's largest resident memory."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def end(self, optimizer: Any) -> None:
        self.wall.append(time.perf_counter() - self.started[0])
        self.cpu.append(time.process_time() - self.started[1])

    def result(self) -> dict[str, Any]:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"seconds": self.wall, "cpu_seconds": self.cpu, "peak_rss_bytes": peak}


class TensorBytes:
    """Bytes of all storages at the highest moment of any step, weights included. It slows steps, so it times none."""

    def __init__(self) -> None:
        from edgepeft.trace import Tracker

        self.tracker = Tracker(cuda=False)
        self.open = contextlib.ExitStack()
        self.steps = 0

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        if not self.steps:
            self.tracker.label_model(model, [p for p in model.parameters() if p.requires_grad])
            # bitsandbytes keeps its scales in objects that are neither parameters nor buffers: look at all that lives
            self.tracker.label([o for o in gc.get_objects() if issubclass(type(o), Tensor)], "weights")
        self.steps += 1
        self.open.enter_context(self.tracker.phase(f"step {self.steps}"))

    def end(self, optimizer: Any) -> None:
        self.open.close()
        self.tracker.label_optimizer(optimizer)

    def result(self) -> dict[str, Any]:
        peak = max(self.tracker.peaks().values(), key=lambda peak: peak.peak_bytes)
        return {"peak_tensor_bytes": peak.peak_bytes, "bytes": dict(peak.bytes)}


def arguments() -> argparse.Namespace:
    """What ``run.py`` tells the process of one side: ``method``, ``precision``, ``steps`` and ``trace``."""
    parser = argparse.ArgumentParser(description="One side of the benchmark; benchmarks/run.py starts it.")
    parser.add_argument("method", choices=("lora", "lst"))
    parser.add_argument(
        "precision", choices=("bf16", "nf4", "nf4-fp32"), help="nf4-fp32: the peer only, computing in fp32"
    )
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--trace", action="store_true", help="count tensor bytes instead of seconds")
    return parser.parse_args()


def chosen(trace: bool) -> Measure:
    """Tensor bytes or seconds."""
    return TensorBytes() if trace else Seconds()


def report(measure: Measure, losses: list[float], model: nn.Module) -> None:
    """Print the result of a side as the last line of its output."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"losses": losses, "trained": trained, "threads": torch.get_num_threads(), **measure.result()}
    print(json.dumps(found), flush=True)
