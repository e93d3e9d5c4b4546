"""The part of the page about memory: what was planned, and how the prediction met the measurement."""

from __future__ import annotations

from edgepeft.report.figures import COLOURED, colour, stacked_bar
from edgepeft.report.markup import Html, cell, join, memory, number, percent, tag
from edgepeft.report.rundir import Record, Run
from edgepeft.surface import EIGHT_BIT

COLUMNS = ("method", "precision", "largest microbatch", "checkpointing", "peak", "fits")
SHOWN = 10


def plan_section(run: Run) -> Html:
    """Every candidate with its memory by kind, against what the hardware has available."""
    if run.plan is None:
        return tag("p", "There is no plan.json: the run stopped before it was planned.", class_="absent")
    candidates: list[Record] = run.plan["candidates"]
    if not candidates:
        return tag("p", "The plan holds no candidates.", class_="absent")
    available: int | None = run.plan.get("available_bytes")
    choice = run.choice
    # The chosen one first, then what fits; the planner's order within each.
    order = sorted(candidates, key=lambda c: (c is not choice, not c["fits"]))
    scale = _scale([c["peak_bytes"] or 0 for c in candidates], available)
    blocks = [_candidate(c, c is choice, scale, available) for c in order]
    head = tag("thead", tag("tr", *(tag("th", column, scope="col") for column in COLUMNS)))
    fitting = sum(bool(c["fits"]) for c in candidates)
    said = f"{fitting} of {len(candidates)} candidates fit on {run.plan['hardware']}"
    parts: list[Html | None] = [
        tag("p", said, f", which has {memory(available)} available." if available is not None else "."),
        None if choice else tag("p", "None was chosen.", class_="bad"),
        _legend(candidates, choice),
        tag("table", head, *blocks[:SHOWN], class_="plan"),
    ]
    if len(blocks) > SHOWN:
        more = tag("table", head, *blocks[SHOWN:], class_="plan")
        parts.append(tag("details", tag("summary", f"{len(blocks) - SHOWN} more candidates"), more))
    parts.append(tag("p", _scale_note(scale, available), class_="note"))
    return join(*parts)


def peak_section(run: Run) -> Html:
    """Predicted and measured peak memory as two bars, and the error of the prediction in percent of the measurement."""
    predicted = run.last("start").get("predicted_peak_bytes")
    measured = run.last("end").get("measured_peak_bytes")
    if predicted is None and measured is None:
        return tag("p", "Nothing was trained yet, so there is nothing to compare.", class_="absent")
    scale = max(predicted or 0, measured or 0, 1)
    rows = [
        join(tag("dt", name), tag("dd", memory(value), None if value is None else _peak_bar(name, value, scale)))
        for name, value in (("predicted", predicted), ("measured", measured))
    ]
    if predicted is None or not measured:
        so_far = [e["memory_bytes"] for e in run.events if e["event"] == "step" and e.get("memory_bytes") is not None]
        seen = f" The most that any step reported is {memory(max(so_far))}." if so_far else ""
        without = "what a sharded model holds is not followed on a CPU" if run.last("end") else "training has not ended"
        missing = f"measurement: {without}" if not measured else "prediction"
        verdict = f"There is no {missing}.{seen}"
    else:
        error = (predicted - measured) / measured
        side = "above" if error >= 0 else "below"
        verdict = f"The prediction is {percent(abs(error))} {side} the measurement."
    return join(tag("dl", *rows), tag("p", verdict), _phases(run))


def _phases(run: Run) -> Html | None:
    """Every phase that was predicted or measured; those of which only one is known say so by an empty cell."""
    predicted: dict[str, int] = (run.plan or {}).get("predicted_phases") or {}
    measured: dict[str, int] = {
        **run.last("end").get("measured_phases", {}),
        **((run.plan or {}).get("measured_phases") or {}),  # of what comes after training
    }
    if not measured:
        return None
    columns = ("phase", "predicted", "measured", "error")
    rows = []
    plan = run.plan or {}
    # Training and merging may be of different processes: of a run that went on later, or on several devices.
    process = max(each.get("measured_process_bytes") or 0 for each in (plan, run.last("end"))) or None
    sizes_of = {name: (predicted.get(name), measured.get(name)) for name in dict.fromkeys((*predicted, *measured))}
    sizes_of["the whole process"] = plan.get("predicted_process_bytes"), process
    for name, both in sizes_of.items():
        error = f"{100 * (both[0] / both[1] - 1):+.1f} %" if both[0] is not None and both[1] else ""
        sizes = ("" if size is None else memory(size) for size in both)
        rows.append(
            tag("tr", *(cell(value, column) for value, column in zip((name, *sizes, error), columns, strict=True)))
        )
    head = tag("thead", tag("tr", *(tag("th", column, scope="col") for column in columns)))
    note = (
        "Bytes of tensors at the peak of each phase. Without a measurement: not reached, or not to be followed here. "
        "Of loading, reloading and exporting on a CPU by how much the process grew: with libraries that came on the "
        "way, and with weights that are mapped as if all were read. "
        "Of the whole process: on a CPU what is resident, with libraries and what the heap keeps; on a GPU what is "
        "reserved."
    )
    return join(tag("table", head, tag("tbody", *rows)), tag("p", note, class_="note"))


def _peak_bar(name: str, value: int, scale: int) -> Html:
    return stacked_bar({name: value}, scale, None, f"{name}: {memory(value)}")


def _candidate(candidate: Record, chosen: bool, scale: float, available: int | None) -> Html:
    peak: int | None = candidate["peak_bytes"]
    parts: dict[str, int] = dict(candidate["bytes"])
    unexplained = (peak or 0) - sum(parts.values())
    if unexplained > 0:
        parts["other"] = parts.get("other", 0) + unexplained
    share = f" ({percent(peak / available)})" if peak is not None and available else ""
    fits = tag("span", "yes" if candidate["fits"] else "no", class_="good" if candidate["fits"] else "bad")
    cells = [
        join(
            candidate["method"],
            *(f", {name}={value}" for name, value in (candidate.get("options") or {}).items()),
            f", {EIGHT_BIT}" if candidate.get("optimizer") == EIGHT_BIT else None,
            tag("b", " chosen") if chosen else None,
        ),
        candidate["precision"],
        number(candidate["microbatch"]),
        "yes" if candidate["checkpointing"] else "no",
        memory(peak) + share,
        fits,
    ]
    row = [cell(content, column) for column, content in zip(COLUMNS, cells, strict=True)]
    label = "; ".join(f"{kind} {memory(bytes_)}" for kind, bytes_ in parts.items())
    bar = tag("tr", tag("td", stacked_bar(parts, scale, available, label), colspan=len(COLUMNS)))
    return tag("tbody", tag("tr", *row), bar, class_="chosen" if chosen else None)


def _legend(candidates: list[Record], choice: Record | None) -> Html:
    """The colours, with the bytes of the chosen candidate."""
    kinds = dict.fromkeys(kind for c in candidates for kind in c["bytes"])
    ordered = [k for k in COLOURED if k in kinds] + [k for k in kinds if k not in COLOURED]
    entries = []
    for kind in ordered:
        value = f" {memory(choice['bytes'].get(kind, 0))}" if choice else None
        entries.append(tag("span", tag("i", class_=colour(kind)), kind, value and tag("b", value)))
    return tag("p", *entries, class_="legend")


def _scale(peaks: list[int], available: int | None) -> float:
    """Bytes of a full bar: the largest peak, but not so much that the bars that fit, or the limit, become a sliver."""
    largest = max(*peaks, 1)
    if available is None or largest * 4 < available:
        return largest
    return min(max(largest, available * 1.02), available * 2)


def _scale_note(scale: float, available: int | None) -> str:
    note = f"A full bar is {memory(scale)}; longer ones are cut at an arrow."
    if available is None:
        return note + " The plan does not say how much memory is available."
    if scale < available:
        return note + f" The available {memory(available)} lie beyond the right edge."
    return note + " The upright line is what the hardware has available."
