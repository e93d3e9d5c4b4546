"""Trace rebuilt runs, each in a process of its own, and print what each takes; ``rows.py`` starts it.

Usage: ``python benchmarks/rebuilt.py '{"harness": "t4", "layers": null, ...}' ...``. One line of JSON for each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any

import torch

from edgepeft.allocator import CachingAllocator


def main(argument: str) -> dict[str, Any]:
    """Bytes of blocks and segments of the caching allocator: at most, over all phases, and segments in each of them."""
    setup = json.loads(argument)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    harness = setup.pop("harness")
    layers = setup.pop("layers")
    if harness == "reality":
        return importlib.import_module(harness).compare(**setup)
    tracker = importlib.import_module(harness).trace(setup, layers)
    phases = list(tracker.phases)
    allocator = CachingAllocator()
    reserved, done = {}, 0
    for count, name in enumerate(phases, start=1):
        history = list(tracker.history(*phases[:count]))
        allocator.peak_reserved_bytes = allocator.reserved_bytes
        allocator.run(history[done:])
        done, reserved[name] = len(history), allocator.peak_reserved_bytes
    return {
        "allocated_bytes": allocator.peak_allocated_bytes,
        "reserved_bytes": max(reserved.values()),
        "reserved_by_phase": reserved,
    }


def apart(argument: str) -> dict[str, Any]:
    """``main`` in a fork of this process, which has the libraries already: a crash there is an answer here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            found = main(argument)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        with os.fdopen(writing, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"error": f"the process ended with status {status}"}


if __name__ == "__main__":
    for module in (
        "reality",
        "peft",
        "bitsandbytes",
        "transformers.models.llama.modeling_llama",
        "transformers.masking_utils",
    ):
        importlib.import_module(module)
    for each in sys.argv[1:]:
        print(json.dumps(apart(each)), flush=True)
