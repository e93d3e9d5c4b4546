"""What a person sees in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgepeft import evidence
from edgepeft.report import heatmap, markup
from edgepeft.surface import ADAMW, EIGHT_BIT

if TYPE_CHECKING:  # each command loads what it shows; help and profiles must not wait for torch
    from edgepeft.hardware import Hardware
    from edgepeft.inferplan import InferencePlan
    from edgepeft.ledger import Row
    from edgepeft.plan import Candidate, Plan

GiB = 2**30
SILENT_SECONDS = 5.0  # between two lines of progress that is not shown on a terminal
WIDE = 208  # columns of a plan; narrower, its numbers would be cut
_screen = Console()
_aside = Console(stderr=True)


def say(line: str) -> None:
    """One line of progress, on standard error."""
    _aside.print(line, highlight=False, markup=False, soft_wrap=True)


def quiet(*anything: Any) -> None:
    """No progress at all, for ``--json``."""


def progress(what: str) -> Callable[[int, int], None]:
    """A counter that overwrites itself on a terminal, and is a line now and then elsewhere."""
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if _aside.is_terminal:
            _aside.print(f"{what} {done}/{total}", end="\r" if done < total else "\n", highlight=False)
        elif time.monotonic() - said > SILENT_SECONDS:
            said = time.monotonic()
            _aside.print(f"{what} {done}/{total}", highlight=False)

    return show


def profiles(found: Sequence[Hardware]) -> None:
    """All profiles, a line each."""
    table = Table(box=None, header_style="bold")
    table.add_column("profile", no_wrap=True)
    table.add_column("device", overflow="ellipsis")
    for column in ("memory\nGiB", "free for\na job", "GB/s", "bf16\nTFLOP/s", "int8\nTOP/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        rates = [f"{each.flops[kind] / 1e12:.1f}" if kind in each.flops else "–" for kind in ("bf16", "int8")]
        sizes = [f"{each.memory_bytes / GiB:.1f}", f"{each.available_bytes / GiB:.1f}"]
        table.add_row(each.name, each.title, *sizes, f"{each.bandwidth / 1e9:.0f}", *rates)
    _screen.print(table)


def profile(each: Hardware) -> None:
    """Every number of one profile, with its source."""
    table = Table(
        "field",
        "value",
        "source",
        box=None,
        header_style="bold",
        title=f"{each.name}: {each.title}",
        title_justify="left",
    )
    numbers: dict[str, Any] = {
        "memory_bytes": each.memory_bytes,
        "reserved_bytes": each.reserved_bytes,
        "bandwidth": each.bandwidth,
        **{f"flops.{kind}": value for kind, value in each.flops.items()},
        **{f"reached.{operation}": share for operation, share in each.reached.items()},
        "interconnect": each.interconnect,
        "call_seconds": each.call_seconds,
        "watts": each.watts,
        "price": each.price,
        "cores": each.cores,
        "instructions": " ".join(each.instructions) or None,
        "providers": ", ".join(each.providers),
    }
    for name, value in numbers.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
            table.add_row(name, shown, each.sources.get(name, ""))
    _screen.print(table)


def methods(found: Sequence[Mapping[str, Any]]) -> None:
    """All methods, a line each, by the survey's taxonomy."""
    table = Table("method", "merges", *_SAVED, box=None, header_style="bold", expand=True)
    table.add_column("paper", no_wrap=True, ratio=1)  # its title is cut where there is no room
    for kind in dict.fromkeys(each["kind"] for each in found):
        table.add_section()
        table.add_row(kind, style="bold")
        for each in (each for each in found if each["kind"] == kind):
            names = ", ".join([each["name"], *(f"{alias} (on {at})" for alias, at in each["aliases"].items())])
            marks = ["✓" if holds else "" for holds in (each["merges"], *(kind in each["saves"] for kind in _SAVED))]
            title, _, source = each["paper"].rpartition(" (")
            year, _, where = source.partition("), ")
            place = where if where.endswith(year) else f"{where} ({year})"
            table.add_row(f" {names}", *marks, f"{place}: {title}")
    Console(width=max(_screen.width, 120)).print(table)
    _screen.print(
        "merges: nothing is left of it at inference. disk, memory, backpropagation: what it saves, compared with full "
        "fine-tuning. `edgepeft methods NAME` shows its options and their defaults.",
        style="dim",
        highlight=False,
    )


_SAVED = ("disk", "memory", "backpropagation")


def method(each: Mapping[str, Any]) -> None:
    """One method with its hyper-parameters."""
    merges = "it merges" if each["merges"] else f"it does not merge, and at inference costs {each['overhead']}"
    lines = (
        f"{each['name']} ({each['kind']}): {each['summary']}",
        each["paper"],
        f"It saves {', '.join(each['saves']) or 'nothing'}; {merges}.",
        f"Several GPUs train it by {' or '.join(map(str.upper, each['strategies'])) or 'no strategy there is'}.",
        *(f"{alias} is {each['name']} on {at}." for alias, at in each["aliases"].items()),
    )
    for line in lines:
        _screen.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("--set", "default", "meaning", box=None, header_style="bold")
    for option in each["options"]:
        default = option["default"]
        shown = ", ".join(default) if isinstance(default, tuple) else default
        table.add_row(f"options.{option['name']}", str(shown), option["meaning"])
    table.add_row("lr", f"{each['learning_rate']:g}", "Learning rate a run starts from.")
    _screen.print(table)


def plan(found: Plan) -> None:
    """What fits, with the bytes of each kind at its peak."""
    free = found.hardware.available_bytes / GiB
    title = f"{found.model} on {found.machine}: {free:.1f} GiB free for a job{' on each' * (found.devices > 1)}"
    if _screen.is_terminal and _screen.width < WIDE:
        _screen.print(narrow(found, title))
    else:
        Console(width=max(_screen.width, WIDE)).print(_wide(found, title))
    _screen.print(
        "GiB at the peak: of the process, of its tensors, and of these by kind. The microbatch is the largest that "
        "fits (1 where none does, the whole update where a method cannot make it of several); TIGHT uses the margin.",
        style="dim",
    )
    _screen.print(found.times, style="dim", highlight=False)
    for line in _beside(found):
        _screen.print(line, style="dim", highlight=False, markup=False)
    if found.choice is not None:
        _screen.print(f"Choice: {found.why}{_as_run(found.chosen())}", highlight=False, markup=False)
        if (job := _job(found)) is not None:
            _screen.print(job, highlight=False)


def _as_run(chosen: Candidate) -> str:
    """What a run of it needs, whose updates may be made of smaller microbatches than fit."""
    if chosen.run_microbatch == chosen.microbatch:
        return ""
    need = chosen.run_process_bytes / GiB
    return f" An update is made of microbatches of {chosen.run_microbatch}, which take {need:.1f} GiB."


def _beside(found: Plan) -> Iterator[str]:
    """What others measured of the methods' quality, with its sources, and what was left out."""
    for method in dict.fromkeys(each.method for each in found.candidates):
        yield from (f"{method}: {line}" for line in evidence.of(method))
    yield from (f"{name}: {source}. No promise for your data." for name, source in evidence.sources().items())
    yield from (f"{method} was left out: {reason}" for method, reason in found.excluded.items())
    if not found.hardware.bf16 and any(each.precision == "bf16" for each in found.candidates):
        yield f"{found.hardware.title} multiplies no bf16: what is stored so is multiplied in fp32."


def narrow(found: Plan, title: str) -> Table:
    """The candidates for a terminal that is too narrow for a column of each kind: they share one."""
    table = Table("", "method", "precision", title=escape(title), title_justify="left", box=None, header_style="bold")
    for column in ("micro-\nbatch", "process", "est.\ns/update"):
        table.add_column(column, justify="right")
    table.add_column("tensors by kind")
    for number, each in enumerate(found.candidates):
        again = "+" * each.checkpointing + f" {each.strategy}" * bool(each.strategy)
        kinds = [
            f"{kind} {each.bytes.get(kind, 0) / GiB:.2f}" for kind in _KINDS if each.bytes.get(kind, 0) >= GiB / 200
        ]
        table.add_row(
            "→" if number == found.choice else each.verdict,
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
        "process",
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
        mark = "→" if number == found.choice else each.verdict
        sizes = [each.process_bytes, each.peak_bytes, *(each.bytes.get(kind, 0) for kind in _KINDS)]
        table.add_row(
            mark,
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


def machines(plans: Sequence[Mapping[str, Any]]) -> None:
    """Machines by methods for one model, as ``Plan.as_json`` gives the plans: the first choice of each method.

    The more fits, the greener.
    """
    ordered, names = heatmap.ordered(plans)
    title = f"{ordered[0]['model']}: each method's first choice, with the largest microbatch that fits"
    table = Table("machine", box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("free", justify="right")
    for name in names:
        table.add_column(name, justify="center", no_wrap=True)
    for each in ordered:
        cells = (_cell(each, name) for name in names)
        table.add_row(each["hardware"], f"{each['available_bytes'] / GiB:.1f} GiB", *cells)
    widest = len(_WIDEST) + len(_HOURS) * any(each["updates"] is not None for each in plans)
    narrowest = 36 + sum(2 + max(len(name), widest) for name in names)
    _screen.print(title, style="bold", highlight=False, markup=False)
    Console(width=max(_screen.width, narrowest)).print(table)
    said = "NO: not even one example fits. *: with no room to spare. +: activations are computed again. "
    said += "⁸: AdamW in 8 bits. Green is by the largest microbatch with any of a method's precisions."
    _screen.print(said, style="dim", highlight=False)


_WIDEST = " 1024 int8+⁸ "
_HOURS = " 0.0012 h"
_GREENS = (194, 157, 120, 83, 77, 71)  # of the terminal's 256 colours, the light ones first


def _cell(found: Mapping[str, Any], method: str) -> Text:
    best = heatmap.best(found, method)
    if best is not None:
        shade = heatmap.depth(found, method) - 1
        size = f"{best['microbatch']:,}{heatmap.tight(best)}"
        marks = "+" * best["checkpointing"] + "⁸" * (best["optimizer"] == EIGHT_BIT)
        hours = "" if best["job"] is None else f" {markup.number(best['job']['hours'], 2)} h"
        shown = f" {size} {best['precision']}{marks}{hours} "
        return Text(shown, style=f"black on color({_GREENS[shade]})")
    tried = any(candidate["method"] == method for candidate in found["candidates"])
    return Text("NO", style="red") if tried else Text("–", style="dim")


def _named(each: Candidate) -> str:
    """Its method, with what of it is not the default, and the optimizer where that is not the usual one."""
    options = [f"{name}={value}" for name, value in each.options.items()]
    return ", ".join([each.method, *options, *([] if each.optimizer == ADAMW else [each.optimizer])])


def _times(found: Plan, candidate: Candidate) -> tuple[str, str, str]:
    """Estimates of a candidate: seconds of an update, tokens per second, hours of the job."""
    job = found.job(candidate)
    seconds, rate = candidate.update_seconds, candidate.tokens_per_second
    return markup.number(seconds, 3), _number(rate, ",.0f"), "" if job is None else markup.number(job.hours, 3)


def _job(found: Plan) -> str | None:
    """What the choice takes for the whole job, in words."""
    job = found.job(found.chosen())
    if job is None:
        return None
    parts = [f"{found.updates:,} updates in about {markup.duration(3600 * job.hours)}"]
    if job.energy_wh is not None:
        parts.append(f"{markup.number(job.energy_wh / 1000, 2)} kWh")
    if job.price is not None:
        parts.append(f"{job.price:,.2f} US dollars")
    return f"Estimated for the job: {', '.join(parts)}."


def markdown(found: Plan) -> str:
    """The plan as a Markdown table."""
    free = found.hardware.available_bytes / GiB
    lines = [
        f"{found.model} on {found.machine}, {free:.1f} GiB free. Sizes in GiB.",
        "",
        "| verdict | method | precision | checkpointed | microbatch | process | tensors | peak in | estimated s/update "
        "| tokens/s | hours |",
        "|---|---|---|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for number, each in enumerate(found.candidates):
        cells = [each.verdict + (" (choice)" if number == found.choice else ""), _named(each), each.precision]
        cells[1] += f" ({each.strategy})" if each.strategy else ""
        cells += ["yes" if each.checkpointing else "", str(each.microbatch)]
        cells += [f"{each.process_bytes / GiB:.2f}", f"{each.peak_bytes / GiB:.2f}", each.phase, *_times(found, each)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", found.times]
    lines += ["", *(f"- {line}" for line in _beside(found))]
    if found.choice is not None:
        lines += ["", f"Choice: {found.why} {_job(found) or ''}".rstrip()]
    return "\n".join(lines)


def inference(found: InferencePlan) -> None:
    """What running a model takes at each precision."""
    free = found.hardware.available_bytes / GiB
    title = f"Running {found.model} on {found.hardware.name}: {free:.1f} GiB free, {found.tokens} tokens of context"
    table = Table("", "precision", title=escape(title), title_justify="left", box=None, header_style="bold")
    for column in ("memory", "weights", "keys and values", "rest", "reads tokens/s", "writes tokens/s"):
        table.add_column(column, justify="right")
    for each in found.variants:
        sizes = (each.needed_bytes, each.weights_bytes, each.cache_bytes, each.working_bytes)
        table.add_row(
            each.verdict,
            each.precision,
            *(f"{size / GiB:.2f}" for size in sizes),
            f"{each.read_tokens_per_second:,.0f}",
            _number(each.write_tokens_per_second, ",.1f"),
            style="dim" if each.verdict == "NO" else None,
        )
    _screen.print(table)
    _screen.print("Sizes in GiB. Speeds are what the device's bandwidth and FLOP/s allow, not measured.", style="dim")


def measured(row: Mapping[str, Any]) -> None:
    """A real step beside its prediction."""
    error = row["predicted_bytes"] / row["allocated_bytes"] - 1
    say(f"{row['method']}, {row['dtype']}, microbatch {row['microbatch']} of {row['seq_len']} tokens on {row['gpu']}")
    say(f"tensors at the peak: {row['allocated_bytes'] / GiB:.3f} GiB, predicted {row['predicted_bytes'] / GiB:.3f}")
    say(f"error of the prediction: {error:+.2%}; process: {row['process_bytes'] / GiB:.3f} GiB; {row['throughput']}")


_KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "temporaries")


def ledger(rows: Sequence[Row]) -> None:
    """Every artefact of a run."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("artefact", no_wrap=True)
    for column in (*names, "MiB", "ms", "tokens/s", "deviation", "same tokens"):
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            "→" if row.kept else "",
            row.artefact,
            *(_number(row.metrics.get(name), ".4f") for name in names),
            _number(None if row.bytes is None else row.bytes / 2**20, ".1f"),
            _number(row.latency_ms, ".1f"),
            _number(row.tokens_per_second, ".1f"),
            _number(row.deviation, ".1e"),
            _number(row.same_tokens, ".0%"),
        )
    _screen.print(table)
    for row in rows:
        if row.note:
            _screen.print(f"{row.artefact}: {row.note}", style="dim", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
