"""Finished runs of ``methods.py`` in ``results/``, so that another machine goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import sweep
from edgepeft.files import write_json, write_text
from tuning import Bench

RESULTS = Path(__file__).resolve().parent / "results"


def path_of(bench: Bench) -> Path:
    """The file of a model's runs: an object from paths below the model's folder to what the runs found."""
    return RESULTS / f"methods-{bench.name}.json"


def keep(bench: Bench) -> None:
    """Write all finished runs of a model, one a line."""
    paths = sorted(
        [*bench.folder.glob("untuned-*.json"), *bench.folder.glob("*/lr-*.json"), *bench.folder.glob("*/speed.json")]
    )
    lines = [
        f"{json.dumps(path.relative_to(bench.folder).as_posix())}: {json.dumps(sweep.read(path))}" for path in paths
    ]
    write_text(path_of(bench), "{\n" + ",\n".join(lines) + "\n}\n")


def restore(bench: Bench) -> None:
    """Put the kept runs that are not on this machine where they would be, had they been done here."""
    if not path_of(bench).exists():
        return
    for name, found in json.loads(path_of(bench).read_text(encoding="utf-8")).items():
        if not (bench.folder / name).exists():
            (bench.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(bench.folder / name, found)
