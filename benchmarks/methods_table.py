"""The tables and plots of ``methods.py``, from whatever runs are finished."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scatter
import sweep
import table
from edgepeft.files import write_text
from edgepeft.methods import base
from tuning import BENCHES, DEV, HEAD_ONLY, SCORED, Bench, Row

_SURE = "*yes* is a lead of two standard errors of that score, *barely* a smaller one."
RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    *("method", "score %", "loss", "better", "rate", "trained M", "trained %", "tensors MB", "training %"),
    *("reading %", "merges", "runs", "note"),
)


@dataclass(frozen=True)
class Line:
    """What is known of a row: ``runs`` are those at the best rate, one or two seeds."""

    row: Row
    results: dict[sweep.Key, dict[str, Any]]
    speed: dict[str, Any]

    @property
    def factor(self) -> float | None:
        return sweep.best(self.results)

    @property
    def runs(self) -> list[dict[str, Any]]:
        both = [self.results.get((self.factor, seed), {}) for seed in (0, 1)] if self.factor else []
        return [run for run in both if "score" in run]

    def mean(self, what: str) -> float:
        return statistics.mean(run[what] for run in self.runs)


def write() -> None:
    """Write ``results/methods.md`` and the plots; models of which fewer rows are complete here keep their section."""
    home = RESULTS / "methods.md"
    written = home.read_text(encoding="utf-8").split("\n## ")[1:] if home.exists() else []
    kept = {section.partition("\n")[0]: f"## {section.rstrip()}\n\n\n" for section in written}
    parts = [
        _text(bench)
        if (bench.folder / "untuned-0.json").exists() and _complete(bench) >= _written(kept.get(bench.title, ""))
        else kept.get(bench.title, f"## {bench.title}\n\nNo run is finished yet.\n\n")
        for bench in BENCHES.values()
    ]
    write_text(
        home,
        f"""# Every method on real models

The survey's Table 5 (arXiv 2303.15647v2) again, on models that a CPU can tune: score, trained parameters, memory and
throughput of every method beside full tuning. `benchmarks/README.md` says what is counted how and how to go on.

- one thread a run; the machine was shared with other work: throughput is in processor seconds, in turn with full tuning
- full tuning of bf16 weights rounds every update at random, which is much of its time

{"".join(parts)}""",
    )


def _complete(bench: Bench) -> int:
    lines = [_line(bench, row) for row in bench.rows()]
    return sum(sweep.complete(line.results) and bool(line.runs) for line in lines)


def _written(section: str) -> int:
    """How many rows a section of the page says are complete."""
    found = re.search(r"^- complete, (\d+) rows", section, re.MULTILINE)
    return int(found[1]) if found else 0


def _text(bench: Bench) -> str:
    lines = [_line(bench, row) for row in bench.rows()]
    whole = [line.row.name for line in lines if sweep.complete(line.results) and line.runs]
    refused = {
        line.row.name: next(iter(line.results.values()))["refused"]
        for line in lines
        if any("refused" in run for run in line.results.values())
    }
    partly = [line.row.name for line in lines if line.results and line.row.name not in (*whole, *refused)]
    missing = [line.row.name for line in lines if not line.results]
    bar = _bar(bench, lines)
    shown = sorted((line for line in lines if line.results and not _refused(line)), key=_order)
    plots = _plots(bench, lines, bar)
    on = table.machine()
    versions = ", ".join(f"{name} {on['versions'][name]}" for name in ("edgepeft", "torch", "transformers"))
    return f"""## {bench.title}

{on["date"]}: {on["processor"]}, cores: {on["cores"]}; Python {on["python"]}, {versions}.

{bench.updates} updates of {bench.batch} examples of up to {bench.tokens} tokens, {bench.precision} weights. The score
is the mean over seeds on {SCORED} validation examples; the rate was chosen on {DEV} others.
{_untuned(bench)}

- complete, {len(whole)} rows (three rates or four at seed 0, the best again at seed 1): {_names(whole)}
- begun, {len(partly)} rows: {_names(partly)}
- refused, {len(refused)} rows: {_names(list(refused))}
- not begun, {len(missing)} rows: {_names(missing)}

{_table(COLUMNS, [_cells(bench, line, lines[0 if bench.task != "classification" else 1], bar) for line in shown])}

{_refusals(refused)}{plots}
"""


def _line(bench: Bench, row: Row) -> Line:
    path = bench.folder / row.name / "speed.json"
    return Line(row, sweep.found(bench, row), sweep.read(path) if path.exists() else {})


def _refused(line: Line) -> bool:
    return any("refused" in run for run in line.results.values())


def _order(line: Line) -> tuple[bool, float]:
    return not line.runs, -line.mean("score") if line.runs else 0.0


def _bar(bench: Bench, lines: list[Line]) -> tuple[str, float, float]:
    """What a method must beat: a name, a score and a loss."""
    head = next((line for line in lines if line.row.method == HEAD_ONLY and line.runs), None)
    if head is not None:
        return "head alone", head.mean("score"), head.mean("loss")
    runs = _before(bench)
    return "untuned", *(statistics.mean(run[what] for run in runs) for what in ("score", "loss"))


def _before(bench: Bench) -> list[dict[str, Any]]:
    paths = [bench.folder / f"untuned-{seed}.json" for seed in (0, 1)]
    return [run for run in (sweep.read(path) for path in paths if path.exists()) if "score" in run]


def _untuned(bench: Bench) -> str:
    runs = _before(bench)
    score, loss = (statistics.mean(run[what] for run in runs) for what in ("score", "loss"))
    said = f"Untuned: {100 * score:.1f} %, {loss:.3f} nats; the larger class has {100 * _larger(bench):.1f} %."
    if bench.task == "classification":
        return f"{said} That is a random head, so *better* compares with training the head alone. {_SURE}"
    if bench.name == "t5" and (path := bench.folder / "pretrained.json").exists():
        made = sweep.read(path)
        said += (
            f" From scratch it had {made['updates']} updates of {made['batch']} of {made['examples']} texts, to answer "
            f"*yes* or *no* to whether there is a comma; then {100 * (2 * made['dev']['token_accuracy'] - 1):.0f} % of "
            "its answers were right on held-out text. Here, on other texts, it is to say *with* and *without* instead. "
            f"All rates are {bench.scale:g} times those for the other models."
        )
    return f"{said} *better* compares with that. {_SURE}"


def _larger(bench: Bench) -> float:
    """The share of the larger class among the scored examples."""
    lines = (bench.data() / "score.jsonl").read_text(encoding="utf-8").splitlines()
    words = Counter(list(json.loads(line).values())[-1] for line in lines)
    return max(words.values()) / len(lines)


def _cells(bench: Bench, line: Line, full: Line, bar: tuple[str, float, float]) -> list[str]:
    trouble = [f"x{key[0]:g}: {_trouble(run)}" for key, run in line.results.items() if "score" not in run]
    notes = [*([line.row.why] if line.row.why else []), *trouble]
    method = base.find(line.row.method)
    merges = "yes" if method.merges else "no"
    speeds = [f"{100 * line.speed[part]['relative']:.0f}" if part in line.speed else "" for part in ("train", "infer")]
    if line.row.method == "full":
        speeds = ["100", "100"]
    seeds = sum(1 for key in line.results if key[1] == 1)
    runs = f"{len(line.results) - seeds} + {seeds}"
    if not line.runs:
        return [line.row.name, *[""] * 7, *speeds, merges, runs, "; ".join(notes)]
    run = line.runs[0]
    if options := run["options"]:
        notes.append("narrow: " + ", ".join(f"{name} {value}" for name, value in options.items()))
    if run["trained_most"] != run["trained"]:
        notes.append(f"at most {run['trained_most'] / 1e6:.2f} M in an earlier stage")
    total = full.runs[0]["trained"] if full.runs else None
    score, loss = line.mean("score"), line.mean("loss")
    spread = f" ± {50 * abs(line.runs[0]['score'] - line.runs[1]['score']):.1f}" if len(line.runs) == 2 else ""
    if score <= _larger(bench):
        notes.append("no more than always naming the larger class")
    rate = sweep.rate(bench, line.row, line.factor or 0)
    end = "" if line.factor in (3.0,) else f" (x{line.factor:g})"
    return [
        line.row.name,
        f"{100 * score:.1f}{spread}",
        f"{loss:.3f}",
        "" if line.row.method == HEAD_ONLY else _better(score, loss, bar),
        f"{rate:.2g}{end}",
        f"{run['trained'] / 1e6:.4f}",
        f"{100 * run['trained'] / total:.3f}" if total else "",
        f"{run['peak_tensor_bytes'] / 1e6:.0f}",
        *speeds,
        merges,
        runs,
        "; ".join(notes),
    ]


def _better(score: float, loss: float, bar: tuple[str, float, float]) -> str:
    if score - bar[1] > 2 * math.sqrt(bar[1] * (1 - bar[1]) / SCORED):
        return "yes"
    return "barely" if score > bar[1] else "loss only" if loss < bar[2] else "**no**"


def _trouble(run: dict[str, Any]) -> str:
    return next(str(run[name]) for name in ("failed", "crashed") if name in run)


def _plots(bench: Bench, lines: list[Line], bar: tuple[str, float, float]) -> str:
    drawn, text = [line for line in lines if line.runs], ""
    kinds = {line.row.name: base.find(line.row.method).kind for line in drawn}
    level = (bar[0], 100 * bar[1])
    for what, key, axis, log in (
        ("memory", "peak_tensor_bytes", "peak of tensors, MB", False),
        ("trainable", "trained", "trained parameters, millions", True),
    ):
        points = [
            scatter.Point(line.row.name, line.runs[0][key] / 1e6, 100 * line.mean("score"), kinds[line.row.name])
            for line in drawn
        ]
        if points:
            plot = scatter.scatter(points, x=axis, y="score, %", log=log, level=level)
            text += _plot(bench, what, f"Score against {axis.split(',')[0]}", plot)
    timed = [line for line in lines if "train" in line.speed]
    if timed:
        rows = [(line.row.name, *(100 * line.speed[p]["relative"] for p in ("train", "infer"))) for line in timed]
        rows.sort(key=lambda row: -row[1])
        text += _plot(bench, "throughput", "Throughput, full tuning = 100 %", scatter.bars(rows, "training", "reading"))
    return text


def _plot(bench: Bench, what: str, title: str, svg: str) -> str:
    name = f"methods-{bench.name}-{what}.svg"
    write_text(RESULTS / name, svg)
    return f"![{title}]({name})\n\n"


def _refusals(refused: dict[str, str]) -> str:
    if not refused:
        return ""
    return "Refused, and why:\n\n" + "".join(f"- {name}: {why}\n" for name, why in refused.items()) + "\n"


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    rule = ["---", *("--:" for _ in head[1:-1]), "---"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(head), rule, *rows])
