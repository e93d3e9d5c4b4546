"""The part of the page about the result: the verdict and the ledger."""

from __future__ import annotations

from edgepeft.ledger import RANKS
from edgepeft.report.markup import MISSING, Html, join, memory, number, percent, table, tag
from edgepeft.report.rundir import Record, Run

# What people ask about first; loss only where nothing else was measured.
HEADLINES = ("accuracy", "token_accuracy", "loss")


def verdict_section(run: Run) -> Html:
    """One sentence, and three figures: the base model, the tuned one, and what goes to the device."""
    rows = run.ledger or []
    base = next((r for r in rows if r["artefact"] == "base"), None)
    tuned = next((r for name in ("adapter", "merged") for r in rows if r["artefact"] == name), None)
    # Each export is measured against the one before it, so the last one kept is the smallest that passed.
    exports = [r for r in rows if r["artefact"].startswith("onnx")]
    device = next((r for r in reversed(exports) if r["kept"]), None)
    metric = _headline([r for r in (base, tuned, device) if r])
    if metric is None:
        return tag("p", _progress(run), class_="verdict open")
    sentence, mood = _sentence(metric, base, tuned, device, bool(exports))
    figures = [
        _figure(name, row, metric, before)
        for name, row, before in (
            ("base model", base, None),
            ("fine-tuned", tuned, base),
            (f"{device['artefact']} on the device" if device else "on the device", device, tuned),
        )
    ]
    return join(tag("p", sentence, class_=f"verdict {mood}"), tag("div", *figures, class_="figures"))


def ledger_section(run: Run) -> Html:
    """Every artefact with its metrics, size and speed, and how far it is from the one before it."""
    if not run.ledger:
        return tag("p", "There is no ledger.json: no artefact was measured yet.", class_="absent")
    metrics = list(dict.fromkeys(name for row in run.ledger for name in row["metrics"]))
    head = ["artefact", *metrics, "size", "latency", "tokens/s", "deviation", "same tokens", "used", "note"]
    rows = [[_artefact(row), *(number(row["metrics"].get(m)) for m in metrics), *_measured(row)] for row in run.ledger]
    explained = (
        "Latency: one example, or the first 32 tokens of a prompt. Tokens/s: decoding. Deviation: the largest "
        "difference of a logit to the artefact before, as a share of the largest logit (of a graph, of 1 at least). "
        "Same tokens: share of greedily decoded tokens that equal the artefact before."
    )
    return join(table(head, rows, class_="cards"), tag("p", explained, class_="note"), _counts(run.ledger))


def _counts(rows: list[Record]) -> Html | None:
    """What the survey's guidelines 1 and 2 ask for, of the adapter and of the merged model that was kept."""
    found = {name: value for row in rows if row["kept"] for name, value in (row.get("counts") or {}).items()}
    if not found:
        return None
    shown = {
        name.removesuffix("_bytes").replace("_", " "): memory(value) if name.endswith("_bytes") else number(value)
        for name, value in found.items()
    }
    if found.get("rank_of_change", 0) >= RANKS:
        shown["rank of change"] = f"{RANKS} or more"
    return tag("p", "; ".join(f"{name}: {value}" for name, value in shown.items()) + ".")


def _artefact(row: Record) -> Html:
    return tag("b", row["artefact"])


def _measured(row: Record) -> list[object]:
    latency, deviation = row.get("latency_ms"), row.get("deviation")
    kept = tag("span", "yes", class_="good") if row["kept"] else ""
    return [
        memory(row.get("bytes")),
        MISSING if latency is None else f"{number(latency, 3)} ms",
        number(row.get("tokens_per_second"), 3),
        number(deviation, 2),
        percent(row.get("same_tokens")),
        kept,
        row.get("note") or "",
    ]


def _headline(rows: list[Record]) -> str | None:
    """The metric to show: the first of the known ones that every row has, else that any has."""
    for wanted in (all, any):
        for name in HEADLINES:
            if rows and wanted(name in row["metrics"] for row in rows):
                return name
    return None


def _sentence(
    metric: str, base: Record | None, tuned: Record | None, device: Record | None, exported: bool
) -> tuple[str, str]:
    """The verdict in words and its mood (a style class): ``good``, ``bad``, or ``open`` when the run has not ended."""
    before, after, shipped = (row["metrics"].get(metric) if row else None for row in (base, tuned, device))
    name = metric.replace("_", " ")
    mood = "good"
    if before is None or after is None:
        said = f"Fine-tuned {name}: {number(after)}." if after is not None else f"Base model {name}: {number(before)}."
    else:
        better = after < before if metric == "loss" else after > before
        said = (
            f"Fine-tuning took {name} from {number(before)} to {number(after)}"
            if better
            else f"Fine-tuning did not help: {name} went from {number(before)} to {number(after)}"
        )
        mood = "good" if better else "bad"
    said = said.rstrip(".")
    if device is not None:
        size = f" in {memory(device['bytes'])}" if device.get("bytes") is not None else ""
        return f"{said}; {device['artefact']}, for the device, has {number(shipped)}{size}.", mood
    if exported:
        return f"{said}; no exported artefact was good enough to keep.", "bad"
    return f"{said}; nothing was exported yet.", "bad" if mood == "bad" else "open"


def _figure(name: str, row: Record | None, metric: str, before: Record | None) -> Html:
    value = row["metrics"].get(metric) if row else None
    reference = before["metrics"].get(metric) if before else None
    details = []
    if value is not None and reference is not None:
        change = value - reference
        details.append(f"{'+' if change >= 0 else '−'}{abs(change):.4g}")
    if row and row.get("bytes") is not None:
        details.append(memory(row["bytes"]))
    label = f"{metric.replace('_', ' ')}, {name}"
    return tag("div", tag("span", label), tag("b", number(value)), tag("small", " · ".join(details)))


def _progress(run: Run) -> str:
    if run.last("end"):
        return "Trained; no artefact was measured yet."
    if run.events:
        steps = run.series("step", "step")
        return f"Training stopped at step {steps[-1][0]:,}." if steps else "Training stopped before its first step."
    return "Planned; not trained yet." if run.plan is not None else "Nothing was done yet."
