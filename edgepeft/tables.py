"""What a person sees in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgepeft.report import heatmap, markup
from edgepeft.surface import EIGHT_BIT

if TYPE_CHECKING:  # each command loads what it shows; help and profiles must not wait for torch
    from edgepeft.hardware import Hardware
    from edgepeft.inferplan import InferencePlan
    from edgepeft.ledger import Row

GiB = 2**30
SILENT_SECONDS = 5.0  # between two lines of progress that is not shown on a terminal
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
