"""Peaks that others measured on their GPUs (``rows.csv``), and their runs traced again in processes of their own."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepeft.files import write_json

FOLDER = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("EDGEPEFT_CACHE", Path.home() / ".cache" / "edgepeft")) / "benchmark-plan"
CODE = (  # what a trace depends on beside its set-up
    *(FOLDER / name for name in ("answers.py", "hf.py", "metamath.json", "rebuilt.py")),
    *(FOLDER.parent / "edgepeft" / f"{name}.py" for name in ("allocator", "cuda_semantics", "trace")),
)
GiB = 2**30


@dataclass(frozen=True)
class Row:
    """A measured run.

    Attributes:
        setup: what the harness needs to know, with numbers as numbers.
        allocated_bytes, reserved_bytes: the measured peaks; None where only the other is known.
    """

    harness: str
    source: str
    gpu: str
    setup: dict[str, Any]
    allocated_bytes: float | None
    reserved_bytes: float | None

    @property
    def label(self) -> str:
        if "experiment" in self.setup:
            return str(self.setup["experiment"])
        short = {key: value for key, value in self.setup.items() if key != "model"}
        return f"{self.setup['model'].split('/')[-1]} " + " ".join(f"{key}={value}" for key, value in short.items())


def read() -> list[Row]:
    """All rows, in the order of the file."""
    with (FOLDER / "rows.csv").open(encoding="utf-8", newline="") as file:
        return [_row(fields) for fields in csv.DictReader(file)]


def traced(
    wanted: Sequence[tuple[str, dict[str, Any], int | None]], libraries: Path | None = None
) -> Iterator[dict[str, Any]]:
    """What ``rebuilt.py`` finds for each (harness, set-up, layers), in this order; ``error`` for what fails.

    What was found before is read from the cache, if nothing that it depends on has changed.

    Args:
        libraries: a folder of packages that are taken in place of those installed here.
    """
    arguments = [json.dumps({"harness": h, "layers": layers, **setup}, sort_keys=True) for h, setup, layers in wanted]
    paths = [CACHE / f"{_key(text, each[0], libraries)}.json" for text, each in zip(arguments, wanted, strict=True)]
    missing = {path: text for path, text in zip(paths, arguments, strict=True) if not path.exists()}
    found = _run(list(missing.values()), libraries)
    for path in paths:
        if path in missing:
            del missing[path]  # the worker answers in the order of the questions
            answer = next(found)
            if "error" not in answer:
                write_json(path, answer)
            yield answer
        else:
            yield json.loads(path.read_text(encoding="utf-8"))


def _run(arguments: list[str], libraries: Path | None) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    first = () if libraries is None else (str(libraries),)
    environment["PYTHONPATH"] = os.pathsep.join((*first, str(FOLDER.parent), environment.get("PYTHONPATH", "")))
    command = [sys.executable, str(FOLDER / "rebuilt.py"), *arguments]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def errors(pairs: Iterable[tuple[float | None, float | None]]) -> list[float]:
    """Relative errors of (predicted, measured), where both are known."""
    return [found / truth - 1 for found, truth in pairs if found is not None and truth is not None]


def _row(fields: dict[str, str]) -> Row:
    pairs = (part.split("=", 1) for part in fields["setup"].split())
    setup = {key: int(value) if value.isdigit() else value for key, value in pairs}
    if "experiment" not in setup:
        setup["model"] = fields["model"]

    def measured(name: str) -> float | None:
        return float(fields[name]) * GiB if fields[name] else None

    return Row(
        harness=fields["harness"],
        source=fields["source"],
        gpu=fields["gpu"],
        setup=setup,
        allocated_bytes=measured("allocated_gib"),
        reserved_bytes=measured("reserved_gib"),
    )


def _key(argument: str, harness: str, libraries: Path | None) -> str:
    content = hashlib.sha256(argument.encode())
    code = sorted((FOLDER.parent / "edgepeft").rglob("*.py")) if harness == "reality" else CODE
    for path in (*code, FOLDER / f"{harness}.py"):
        content.update(path.read_bytes())
    where = sys.path if libraries is None else [str(libraries), *sys.path]
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        content.update(next(iter(importlib.metadata.distributions(name=name, path=where))).version.encode())
    return content.hexdigest()
