"""A plan as a person reads it: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgepeft import evidence
from edgepeft.candidate import LARGEST_MICROBATCH, Candidate
from edgepeft.plan import GiB, Plan
from edgepeft.report import markup
from edgepeft.surface import ADAMW, KINDS

WIDE = 208  # columns of a plan; narrower, its numbers would be cut
_screen = Console()


def show(found: Plan) -> None:
    """What fits, with the bytes of each kind at its peak."""
    free = found.hardware.available_bytes / GiB
    title = f"{found.model} on {found.machine}: {free:.1f} GiB free for a job{' on each' * (found.devices > 1)}"
    if _screen.is_terminal and _screen.width < WIDE:
        _screen.print(narrow(found, title))
    else:
        Console(width=max(_screen.width, WIDE)).print(_wide(found, title))
    _screen.print(f"GiB at the peak: {_meant(found)}", style="dim", highlight=False)
    _screen.print(found.times, style="dim", highlight=False)
    for line in _beside(found):
        _screen.print(line, style="dim", highlight=False, markup=False)
    if found.choice is not None:
        _screen.print(f"Choice: {_chosen(found)}", highlight=False, markup=False)
        if (job := _job(found)) is not None:
            _screen.print(job, highlight=False)


def _meant(found: Plan) -> str:
    """What the columns are."""
    context = found.hardware.reserved_bytes / GiB
    held = (
        f"what PyTorch's allocator reserves (the context takes {context:.1f} GiB beside it, which is not free)"
        if found.hardware.kind == "cuda"
        else "of the process"
    )
    return (
        f"{held}, of its tensors, and of these by kind. The microbatch is the largest that fits, up to "
        f"{LARGEST_MICROBATCH} (1 where none does, the whole update where a method cannot make it of several); TIGHT "
        "uses the margin."
    )


def _held(found: Plan) -> str:
    """A column: what is held against the memory that is free."""
    return "reserved" if found.hardware.kind == "cuda" else "process"


def _chosen(found: Plan) -> str:
    """The choice, how sure it is, and what a run of it needs, whose microbatches may be smaller than fit."""
    chosen = found.chosen()
    said = found.why
    if chosen.verdict == "TIGHT":
        said += " It is TIGHT: it needs some of the margin that is kept for what no plan foresees, and may run out."
    if chosen.run_microbatch != chosen.microbatch:
        need = chosen.run_process_bytes / GiB
        said += f" An update is made of microbatches of {chosen.run_microbatch}, which take {need:.1f} GiB."
    return said


def _beside(found: Plan) -> Iterator[str]:
    """What others measured of the methods' quality, with its sources, and what was left out."""
    for method in dict.fromkeys(each.method for each in found.candidates):
        yield from (f"{method}: {line}" for line in evidence.of(method))
    yield from (f"{name}: {source}. No promise for your data." for name, source in evidence.sources().items())
    yield from (f"{method} was left out: {reason}" for method, reason in found.excluded.items())
    if not found.hardware.bf16 and any(each.precision != "fp32" for each in found.candidates):
        yield f"{found.hardware.title} multiplies no bf16: what is kept so is multiplied in fp32, attention too."
    if found.devices > 1:
        yield "What NCCL keeps for sending, some hundred MB of each device, is not counted."
        yield "The process of each device loads the whole model into the computer's memory first."


def narrow(found: Plan, title: str) -> Table:
    """The candidates for a terminal that is too narrow for a column of each kind: they share one."""
    table = Table(title=escape(title), title_justify="left", box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("method")
    table.add_column("precision")
    for column in ("micro-\nbatch", _held(found), "est.\ns/update"):
        table.add_column(column, justify="right")
    table.add_column("tensors by kind")
    for number, each in enumerate(found.candidates):
        again = "+" * each.checkpointing + f" {each.strategy}" * bool(each.strategy)
        kinds = [
            f"{kind} {each.bytes.get(kind, 0) / GiB:.2f}" for kind in KINDS if each.bytes.get(kind, 0) >= GiB / 200
        ]
        table.add_row(
            _verdict(found, number).replace(" ", "\n"),
            escape(_named(each)),
            f"{each.precision}{again}",
            str(each.microbatch),
            f"{each.process_bytes / GiB:.2f}",
            _times(found, each)[0],
            f"{', '.join(kinds)} in {each.phase}",
            style="bold" if number == found.choice else None if each.fits else "dim",
        )
    table.caption = "+: activations are computed again."
    table.caption_justify = "left"
    return table


def _wide(found: Plan, title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, header_style="bold")
    for column in ("", "method", "precision", "checkpointed", *(["shared by"] * (found.devices > 1))):
        table.add_column(column)
    for column in (
        "microbatch",
        _held(found),
        "tensors",
        "weights",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "temporaries",
    ):
        table.add_column(column, justify="right")
    table.add_column("in")
    timed = [f"est. {column}" for column in ("s/update", "tokens/s", *([] if found.updates is None else ["hours"]))]
    for column in timed:
        table.add_column(column, justify="right")
    for number, each in enumerate(found.candidates):
        sizes = [each.process_bytes, each.peak_bytes, *(each.bytes.get(kind, 0) for kind in KINDS)]
        table.add_row(
            _verdict(found, number),
            escape(_named(each)),
            each.precision,
            "yes" if each.checkpointing else "",
            *([each.strategy] * (found.devices > 1)),
            str(each.microbatch),
            *(f"{size / GiB:.2f}" for size in sizes),
            each.phase,
            *_times(found, each)[: len(timed)],
            style="bold" if number == found.choice else None if each.fits else "dim",
        )
    return table


def _verdict(found: Plan, number: int) -> str:
    return "→ " * (number == found.choice) + found.candidates[number].verdict


def _named(each: Candidate) -> str:
    """Its method, with what of it is not the default, and the optimizer where that is not the usual one."""
    options = [f"{name}={value}" for name, value in each.options.items()]
    return ", ".join([each.method, *options, *([] if each.optimizer == ADAMW else [each.optimizer])])


def _times(found: Plan, candidate: Candidate) -> tuple[str, str, str]:
    """Estimates of a candidate: seconds of an update, tokens per second, hours of the job."""
    job = found.job(candidate)
    seconds, rate = candidate.update_seconds, candidate.tokens_per_second
    tokens = "" if rate is None else f"{rate:,.0f}"
    return markup.number(seconds, 3), tokens, "" if job is None else markup.number(job.hours, 3)


def _job(found: Plan) -> str | None:
    """What the choice takes for the whole job, in words."""
    job = found.job(found.chosen())
    if job is None:
        return None
    parts = [f"{found.updates:,} updates in about {markup.duration(3600 * job.hours)}"]
    if job.energy_wh is not None:
        parts.append(f"at most {markup.number(job.energy_wh / 1000, 2)} kWh")
    if job.price is not None:
        parts.append(f"{job.price:,.2f} US dollars")
    return f"Estimated for the job: {', '.join(parts)}."


def markdown(found: Plan) -> str:
    """The plan as a Markdown table."""
    free = found.hardware.available_bytes / GiB
    lines = [
        f"{found.model} on {found.machine}, {free:.1f} GiB free. GiB at the peak: {_meant(found)}",
        "",
        f"| verdict | method | precision | checkpointed | microbatch | {_held(found)} | tensors | {' | '.join(KINDS)} "
        "| peak in | estimated s/update | tokens/s | hours |",
        f"|---|---|---|---|--:|--:|--:|{'--:|' * len(KINDS)}---|--:|--:|--:|",
    ]
    for number, each in enumerate(found.candidates):
        cells = [each.verdict + (" (choice)" if number == found.choice else ""), _named(each), each.precision]
        cells[1] += f" ({each.strategy})" if each.strategy else ""
        cells += ["yes" if each.checkpointing else "", str(each.microbatch)]
        sizes = [each.process_bytes, each.peak_bytes, *(each.bytes.get(kind, 0) for kind in KINDS)]
        cells += [*(f"{size / GiB:.2f}" for size in sizes), each.phase, *_times(found, each)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", found.times]
    lines += ["", *(f"- {line}" for line in _beside(found))]
    if found.choice is not None:
        lines += ["", f"Choice: {_chosen(found)} {_job(found) or ''}".rstrip()]
    return "\n".join(lines)
