"""The part of the page about training: its curves and what it took."""

from __future__ import annotations

import math
from statistics import median

from edgepeft.report.figures import Series, curve, smoothed
from edgepeft.report.markup import Html, counted, duration, join, memory, number, table, tag
from edgepeft.report.rundir import Run
from edgepeft.surface import DDP, FSDP

_EACH = {DDP: ", each with a copy of the model", FSDP: ", each with a part of the model"}  # older logs do not say


def training_section(run: Run) -> Html:
    """Facts of the training, the loss curve with the evaluations on it, and one curve for each other metric."""
    if not run.events:
        return tag("p", "There is no events.jsonl: nothing was trained here.", class_="absent")
    loss = run.series("step", "loss")
    names = dict.fromkeys(name for e in run.events if e["event"] == "evaluation" for name in e.get("metrics", {}))
    metrics = {name: run.series("evaluation", "metrics", name) for name in names}
    metrics = {name: points for name, points in metrics.items() if points}
    resumed = [int(e["step"]) for e in run.events if e["event"] == "resume"]
    last = max((step for points in (loss, *metrics.values()) for step, _ in points), default=0)

    losses = [Series("training loss", loss, "faint"), Series("smoothed", smoothed(loss), "line")] if loss else []
    if "loss" in metrics:
        losses.append(Series("evaluation loss", metrics.pop("loss"), "dots"))
    charts = [curve(losses, "loss over steps", last, resumed)] if losses else []
    charts += [
        curve([Series(f"evaluation {n}", p, "dots")], f"{n} over steps", last, resumed) for n, p in metrics.items()
    ]
    return join(
        tag("dl", *(join(tag("dt", k), tag("dd", v)) for k, v in _facts(run, loss).items())),
        *(charts or [tag("p", "No step was recorded yet.", class_="absent")]),
        _stages(run),
        _evaluations(run, list(names)),
        *(tag("p", note, class_="bad") for note in _doubts(run)),
    )


def _facts(run: Run, loss: list[tuple[int, float]]) -> dict[str, str]:
    facts: dict[str, str] = {}
    start, end = run.last("start"), run.last("end")
    if start.get("devices", 1) > 1:
        facts["devices"] = f"{start['devices']}{_EACH.get(start.get('strategy', ''), '')}"
    if loss:
        facts["steps"] = number(loss[-1][0])
        facts["training loss"] = (
            f"{number(smoothed(loss)[-1][1])} (smoothed), {number(loss[0][1])} at step {loss[0][0]}"
        )
    speed = [rate for _, rate in run.series("step", "tokens_per_second")]
    if speed:
        facts["tokens/s"] = f"{number(median(speed), 3)} (median)"
    if end.get("seconds") is not None:
        facts["time"] = duration(end["seconds"])
    return facts


def _stages(run: Run) -> Html | None:
    """What each stage took, of a training with several: its parameters, its peak, its speed."""
    stages = run.last("end").get("stages") or []
    if len(stages) < 2:
        return None
    rows: list[list[object]] = [
        [
            tag("b", stage["name"]),
            f"{stage['trained']:,}",
            number(stage["updates"]),
            memory(stage["peak_bytes"]),
            number(stage["tokens_per_second"], 3),
            duration(stage["seconds"]),
        ]
        for stage in stages
    ]
    return table(["stage", "parameters trained", "steps", "peak", "tokens/s", "time"], rows, class_="cards")


def _evaluations(run: Run, names: list[str]) -> Html | None:
    latest = {int(e["step"]): e for e in run.events if e["event"] == "evaluation" and "step" in e}
    if not latest:
        return None
    best = max((step for step, e in latest.items() if e.get("best")), default=None)
    rows: list[list[object]] = [
        [number(step), *(number(e.get("metrics", {}).get(name)) for name in names), "best" if step == best else ""]
        for step, e in sorted(latest.items())
    ]
    return tag(
        "details", tag("summary", counted(len(rows), "evaluation")), table(["step", *names, ""], rows, class_="cards")
    )


def _doubts(run: Run) -> list[str]:
    """What a reader of the curves must know before trusting them."""
    doubts = []
    lost = sum(e["event"] == "step" and e.get("loss") is not None and not math.isfinite(e["loss"]) for e in run.events)
    if lost:
        doubts.append(f"{counted(lost, 'step')} had a loss that is NaN or infinite: not drawn.")
    if run.unreadable_lines:
        doubts.append(
            f"events.jsonl has {counted(run.unreadable_lines, 'unreadable line')}, as a killed process leaves."
        )
    if run.last("start") and not run.last("end"):
        doubts.append("Training has not ended; the same command resumes it.")
    return doubts
