"""SVG drawn by hand: stacked bars of memory, and curves with axes.

Positions along a figure are percentages, so that a figure takes the width of its page while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgepeft.report.markup import Html, join, memory, number, tag

Point = tuple[float, float]
COLOURED = ("weights", "adapter", "gradients", "optimizer", "activations", "temporaries", "predicted", "measured")
POINTS_DRAWN = 800


def colour(kind: str) -> str:
    """The style class of a part of a bar; kinds the page does not know are grey."""
    return f"k-{kind}" if kind in COLOURED else "k-other"


def stacked_bar(parts: Mapping[str, int], scale_bytes: float, limit_bytes: int | None, label: str) -> Html:
    """A bar whose full width is ``scale_bytes``, with a line at ``limit_bytes``; a longer one is cut, with an arrow."""
    pieces, start = [], 0.0
    for kind, bytes_ in parts.items():
        width = 100 * bytes_ / scale_bytes
        piece = tag("title", f"{kind}: {memory(bytes_)}")
        pieces.append(tag("rect", piece, x=f"{start:.3f}%", width=f"{width:.3f}%", y=3, height=16, class_=colour(kind)))
        start += width
    if start > 100.01:
        pieces.append(tag("text", "▸", x="100%", y=16, text_anchor="end", class_="cut"))
    if limit_bytes is not None and limit_bytes <= scale_bytes:
        at = f"{100 * limit_bytes / scale_bytes:.3f}%"
        pieces.append(
            tag("line", tag("title", f"available: {memory(limit_bytes)}"), x1=at, x2=at, y1=0, y2=22, class_="limit")
        )
    return tag("svg", *pieces, width="100%", height=22, role="img", aria_label=label, class_="bar")


@dataclass(frozen=True)
class Series:
    """Points ``(step, value)`` in order of step, drawn as a faint line, a line, or a line with dots."""

    name: str
    points: Sequence[Point]
    style: Literal["faint", "line", "dots"]


def curve(series: Sequence[Series], label: str, last_step: int, resumed: Sequence[int] = ()) -> Html:
    """Curves over steps 0 to ``last_step`` with axes, ticks and a legend; dashed uprights where the run was resumed.

    Every series needs a point.
    """
    values = [y for s in series for _, y in s.points]
    right = max(last_step, 1)
    room = 0.06 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    bottom, top = min(values) - room, max(values) + room

    def x(step: float) -> float:
        return 100 * step / right

    def y(value: float) -> float:
        return 100 * (top - value) / (top - bottom)

    axes = [
        join(
            tag("line", x1="0%", x2="100%", y1=f"{y(v):.2f}%", y2=f"{y(v):.2f}%", class_="grid"),
            tag("text", f"{v:,.10g}", x="0%", y=f"{y(v):.2f}%", dx=-8, dy=4, text_anchor="end"),
        )
        for v in ticks(bottom, top, 5)
    ]
    for v in ticks(0, right, 6):
        if v == int(v):  # there is no half step
            axes.append(tag("text", f"{v:,.10g}", x=f"{x(v):.2f}%", y="100%", dy=20, text_anchor="middle"))
    axes.append(tag("line", x1="0%", x2="100%", y1="100%", y2="100%", class_="axis"))
    for step in resumed:
        at = f"{x(step):.2f}%"
        axes.append(
            tag("line", tag("title", f"resumed at step {step}"), x1=at, x2=at, y1="0%", y2="100%", class_="resumed")
        )
    lines = [
        tag("polyline", points=" ".join(f"{x(a):.3f},{y(b):.3f}" for a, b in thinned(s.points)), class_=f"s-{s.style}")
        for s in series
    ]
    dots = [
        tag("circle", tag("title", f"{s.name} at step {a:g}: {number(b)}"), cx=f"{x(a):.2f}%", cy=f"{y(b):.2f}%", r=4)
        for s in series
        for a, b in s.points
        if s.style == "dots"
    ]
    # The inner drawing is stretched to the figure; its strokes are kept from stretching by the style sheet.
    plot = tag(
        "svg", *lines, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%", class_="plot"
    )
    legend = tag("p", *(tag("span", tag("i", class_=f"s-{s.style}"), s.name) for s in series), class_="legend")
    drawing = tag("svg", *axes, plot, *dots, width="100%", height=220, role="img", aria_label=label)
    return tag("figure", legend, tag("div", drawing, tag("p", "step", class_="unit"), class_="curve"))


def ticks(low: float, high: float, about: int) -> list[float]:
    """The round numbers inside ``[low, high]``, 1, 2 or 5 times a power of ten apart: about ``about`` of them.

    Requires ``low < high``.
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(points: Sequence[Point], limit: int = POINTS_DRAWN) -> list[Point]:
    """At most ``limit`` of the points: the lowest and highest of each stretch, so that spikes stay visible."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    stretches = limit // 2
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The exponential mean over about a thirtieth of the curve, without the bias towards its starting value.

    Adam's correction (Kingma and Ba, 2015): each mean is divided by the weight seen so far, so the first is itself.
    """
    decay = 1 - 1 / max(1.0, len(points) / 30)
    mean, weight, result = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append((step, mean / weight))
    return result
