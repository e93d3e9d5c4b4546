"""One self-contained page for a model: machines by methods, coloured by what fits and with which microbatch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from edgepeft.files import write_text
from edgepeft.report.markup import Html, counted, join, memory, number, tag
from edgepeft.surface import EIGHT_BIT

Plan = Mapping[str, Any]
STEPS = (1, 2, 4, 8, 16, 32)  # microbatches at which the colour deepens


def write(plans: Sequence[Plan], path: Path) -> None:
    """Write the page.

    Args:
        plans: one plan of the same model for each machine, as ``Plan.as_json`` gives them.
    """
    model = plans[0]["model"]
    page = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    title = tag("title", f"edgepeft: {model} on {counted(len(plans), 'machine')}")
    write_text(path, page.substitute(title=title, body=body(plans)))


def is_page(path: Path) -> bool:
    """Whether a file is a page of ``write``, going by its title: one that may be written anew."""
    if not path.is_file():
        return False
    start = path.read_bytes()[:2000].decode("utf-8", errors="replace")
    return re.search(r"<title>edgepeft: .* on [\d,]+ machines?</title>", start) is not None


def body(plans: Sequence[Plan]) -> Html:
    """The inside of the page. Machines are rows, the smallest first; each cell opens on a tap."""
    machines, methods = ordered(plans)
    head = tag("tr", tag("th", "machine", scope="col"), *(tag("th", tag("span", m), scope="col") for m in methods))
    rows = [_row(plan, methods) for plan in machines]
    fitting = sum(best(plan, method) is not None for plan in machines for method in methods)
    said = f"{fitting} of {counted(len(machines) * len(methods), 'pair')} of machine and method fit."
    return join(
        tag("h1", machines[0]["model"]),
        tag("p", said, class_="subtitle"),
        _legend(),
        tag("div", tag("table", tag("thead", head), tag("tbody", *rows), class_="heat"), class_="scroll"),
        tag(
            "p",
            "A cell shows the plan's first choice of a method, by the largest microbatch that fits; * uses the margin. "
            "The colour is that of the largest with any of its precisions. Tap it for its precision and memory.",
            class_="note",
        ),
    )


def ordered(plans: Sequence[Plan]) -> tuple[list[Plan], list[str]]:
    """The plans, that of the smallest machine first, and the methods.

    What most machines can run comes first, so that a phone shows it without scrolling.
    """
    machines = sorted(plans, key=lambda plan: plan["available_bytes"])
    methods = list(dict.fromkeys(c["method"] for plan in machines for c in plan["candidates"]))
    methods.sort(key=lambda method: -sum(best(plan, method) is not None for plan in machines))
    return machines, methods


def best(plan: Plan, method: str) -> Mapping[str, Any] | None:
    """The method's first candidate that fits: plans are ordered, best first."""
    return next((c for c in plan["candidates"] if c["method"] == method and c["fits"]), None)


def depth(plan: Plan, method: str) -> int:
    """How deep the colour of a method that fits is: by the largest microbatch of all its candidates, so that a larger
    machine is no lighter because it can afford what takes more memory.
    """
    fitting = [c["microbatch"] for c in plan["candidates"] if c["method"] == method and c["fits"]]
    return sum(max(fitting) >= step for step in STEPS)


def tight(candidate: Mapping[str, Any]) -> str:
    """The mark of a candidate that fits into the margin only."""
    return "*" if candidate["verdict"] == "TIGHT" else ""


def _row(plan: Plan, methods: Sequence[str]) -> Html:
    name = join(plan["hardware"], tag("small", memory(plan["available_bytes"])))
    return tag("tr", tag("th", name, scope="row"), *(_cell(plan, method) for method in methods))


def _cell(plan: Plan, method: str) -> Html:
    found = best(plan, method)
    if found is not None:
        shown = _opened(f"{found['microbatch']:,}{tight(found)}", found, plan)
        return tag("td", shown, class_=f"fit heat{depth(plan, method)}")
    tried = [c for c in plan["candidates"] if c["method"] == method]
    if not tried:
        return tag("td", "–", class_="untried", title=f"{method} cannot train this model here")
    least = min(tried, key=lambda candidate: candidate["process_bytes"])
    return tag("td", _opened("no", least, plan), class_="unfit")


def _opened(shown: str, candidate: Mapping[str, Any], plan: Plan) -> Html:
    """What the cell says when it is tapped, and when the pointer rests on it."""
    peak = f"process {memory(candidate['process_bytes'])} of {memory(plan['available_bytes'])}"
    again = ", checkpointed" if candidate["checkpointing"] else ""
    again += f", {EIGHT_BIT}" if candidate.get("optimizer") == EIGHT_BIT else ""
    what = f"{candidate['method']}, {candidate['precision']}{again}"
    parts = sorted(candidate["bytes"].items(), key=lambda item: -item[1])
    seconds = candidate.get("update_seconds")
    time = None if seconds is None else f"about {number(seconds, 2)} s an update (estimated)"
    job = candidate.get("job")
    whole = None if job is None else f"about {number(job['hours'], 2)} h for the job"
    lines = [
        tag("b", what),
        peak,
        f"in {candidate['phase']}",
        time,
        whole,
        *(f"{k} {memory(v)}" for k, v in parts if v),
    ]
    inside = tag("div", *(tag("div", line) for line in lines if line is not None))
    return tag("details", tag("summary", shown, title=f"{plan['hardware']}: {what}, {peak}"), inside)


def _legend() -> Html:
    shown = [tag("span", tag("i", class_=f"fit heat{i + 1}"), f"{step}") for i, step in enumerate(STEPS)]
    return tag("p", "microbatch", *shown, tag("span", tag("i", class_="unfit"), "does not fit"), class_="legend")
