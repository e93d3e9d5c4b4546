"""Every method on real models: the survey's Table 5 again, beside full tuning.

Usage: ``python benchmarks/methods.py [minilm] [t5] [smollm2] [--only METHOD ...] [--minutes N] [--report]``. Runs go on
where they were stopped; the tables in ``benchmarks/results/methods.md`` are written from all that there are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # before torch is loaded

import kept
import methods_table
import sweep
import tuned
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.files import write_json
from tuning import BENCHES, HEAD_ONLY, OTHERS, STATE, Bench, Row

PROMPTED = ("spot", "ipt")  # start from the prompts of other tasks, which are trained before their first run
Run = tuple[Path, Callable[..., dict[str, Any]], tuple[Any, ...]]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bench", nargs="*", choices=[[], *BENCHES], help="all when none is named")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="rows of these methods alone")
    parser.add_argument("--speed", action="store_true", help="time steps instead of tuning; needs a quiet machine")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--report", action="store_true", help="only write the tables from what there is")
    given = parser.parse_args(argv)
    STATE.mkdir(parents=True, exist_ok=True)
    # Children are forked from a server that has imported everything: a run does not pay for it, nor see later edits.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tuned"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + 60 * given.minutes
    benches = [BENCHES[name] for name in given.bench or BENCHES]
    for bench in BENCHES.values():
        if not bench.made_here:
            kept.restore(bench)
    if not given.report:
        for bench in benches:
            rows = [row for row in bench.rows() if not given.only or row.name in given.only or row.method in given.only]
            for path, what, arguments in speeds(bench, rows) if given.speed else runs(bench, rows):
                if time.monotonic() > end:
                    break
                _process(server, path, what, arguments, bench.seconds)
    for bench in BENCHES.values():
        if not bench.made_here and (bench.folder / "untuned-0.json").exists():
            kept.keep(bench)
    methods_table.write()


def runs(bench: Bench, rows: list[Row]) -> Iterator[Run]:
    """What is not there yet, one at a time: a first rate of every row, then the next, so that all rows grow."""
    if bench.made_here and not bench.model.is_dir():
        yield bench.folder / "pretrained.json", tuned.pretrain, ()
    if not bench.model.is_dir():
        raise UsageError(f"There is no {bench.model}.", "", "Run: python tools/models.py")
    bench.data()
    for seed in (0, 1) if bench.task == "classification" else (0,):  # only a new head depends on it
        yield from _missing(bench.folder / f"untuned-{seed}.json", tuned.untuned, bench.name, seed)
    for number in range(len(sweep.FACTORS) + 2):
        for row in rows:
            wanted = sweep.wanted(sweep.found(bench, row))
            if row.method in PROMPTED:
                for other in OTHERS:
                    bench.data(other)
                    yield from _missing(bench.folder / f"prompt-{other}.json", tuned.prompt, bench.name, other)
            if len(wanted) > number:
                factor, seed = wanted[number]
                rate = sweep.rate(bench, row, factor)
                yield from _missing(sweep.path_of(bench, row, factor, seed), tuned.tune, bench.name, row, rate, seed)


def speeds(bench: Bench, rows: list[Row]) -> Iterator[Run]:
    """The timings that are not there yet."""
    for row in rows:
        ready = row.method not in PROMPTED or all((bench.folder / "prompts" / other).is_dir() for other in OTHERS)
        if row.method not in ("full", HEAD_ONLY) and ready:
            yield from _missing(bench.folder / row.name / "speed.json", tuned.speed, bench.name, row)


def _missing(path: Path, what: Callable[..., dict[str, Any]], *arguments: Any) -> Iterator[Run]:
    if not path.exists():
        yield path, what, arguments


def _process(server: Any, path: Path, what: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> None:
    """Do a run in a process of its own, and end it when it takes too long; what is killed leaves nothing."""
    began = time.monotonic()
    print(f"{path.relative_to(STATE)} ... ", end="", file=sys.stderr, flush=True)
    process = server.Process(target=tuned.alone, args=(what, path, *arguments))
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            write_json(path, {"failed": f"it took longer than {seconds} s"})
    finally:  # also when this process is told to stop
        if process.is_alive():
            process.kill()
            process.join()
    took = time.monotonic() - began
    result = sweep.read(path) if path.exists() else {"failed": "the process was killed"}
    print(f"{_brief(result)} ({took:.0f} s)", file=sys.stderr, flush=True)


def _brief(result: dict[str, Any]) -> str:
    for name in ("refused", "failed", "crashed"):
        if name in result:
            return f"{name}: {result[name]}"
    if "score" in result:
        return f"score {result['score']:.3f}, loss {result['loss']:.3f}"
    if "train" in result:
        return f"training {result['train']['relative']:.2f}, reading {result['infer']['relative']:.2f}"
    return str(result.get("dev", ""))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
