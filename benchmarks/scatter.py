"""Plots as SVG files of their own: named points, and bars in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgepeft.report.figures import ticks
from edgepeft.report.markup import Html, tag

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 50
LETTER, LINE = 5.6, 11  # of a label's type, roughly
COLOURS = {"additive": "#0072b2", "selective": "#d55e00", "reparametrised": "#009e73", "hybrid": "#cc79a7"}
GREY, INK = "#ddd", "#333"


@dataclass(frozen=True)
class Point:
    """A named place in a plot, coloured by the kind of its method."""

    name: str
    x: float
    y: float
    kind: str


def scatter(points: Sequence[Point], *, x: str, y: str, log: bool, level: tuple[str, float] | None) -> str:
    """Points with their names.

    Args:
        x, y: what the axes show.
        log: whether the horizontal axis is logarithmic.
        level: a name and a height for a dashed line across.
    """
    heights = [point.y for point in points] + ([level[1]] if level else [])
    bottom, top = _room(min(heights), max(heights))
    places = [math.log10(point.x) if log else point.x for point in points]
    left, right = _room(min(places), max(places))

    def at(across: float, up: float) -> tuple[float, float]:
        return (
            LEFT + (across - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            TOP + (top - up) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
        )

    drawn: list[Html] = []
    for value in ticks(bottom, top, 6):
        _, height = at(left, value)
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(height), y2=_n(height), stroke=GREY))
        drawn.append(_text(f"{value:g}", LEFT - 6, height + 4, anchor="end"))
    for value in range(math.ceil(left), math.floor(right) + 1) if log else ticks(left, right, 7):
        across, _ = at(value, bottom)
        drawn.append(tag("line", x1=_n(across), x2=_n(across), y1=TOP, y2=HEIGHT - BOTTOM, stroke=GREY))
        drawn.append(_text(f"{10.0**value if log else value:g}", across, HEIGHT - BOTTOM + 16, anchor="middle"))
    if level:
        _, height = at(left, level[1])
        drawn.append(
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(height), y2=_n(height), stroke=INK, stroke_dasharray="4 3")
        )
        drawn.append(_text(level[0], WIDTH - RIGHT, height - 4, anchor="end"))
    dots = [at(across, point.y) for across, point in zip(places, points, strict=True)]
    taken = [(cx - 4, cy - 4, cx + 4, cy + 4) for cx, cy in dots]
    for point, (cx, cy) in zip(points, dots, strict=True):
        drawn.append(tag("circle", tag("title", point.name), cx=_n(cx), cy=_n(cy), r=4, fill=COLOURS[point.kind]))
        label = _free(point.name, cx, cy, taken)
        taken.append(label)
        drawn.append(_text(point.name, label[0], label[3] - 2, colour=COLOURS[point.kind], size=10))
    for number, (kind, colour) in enumerate(COLOURS.items()):
        drawn.append(_text(f"● {kind}", WIDTH - RIGHT - 420 + 110 * number, TOP - 12, colour=colour))
    drawn.append(_text(x, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, anchor="middle"))
    drawn.append(_text(y, LEFT, TOP - 12))
    return _page(drawn, HEIGHT)


def bars(rows: Sequence[tuple[str, float, float]], first: str, second: str) -> str:
    """Two bars for each name, in percent, with a line at 100."""
    step, start = 26, 150
    height = TOP + step * len(rows) + BOTTOM
    right = max(100.0, *(value for _, *pair in rows for value in pair)) * 1.05

    def across(value: float) -> float:
        return start + value / right * (WIDTH - start - RIGHT)

    drawn: list[Html] = []
    for value in ticks(0, right, 8):
        drawn.append(tag("line", x1=_n(across(value)), x2=_n(across(value)), y1=TOP, y2=height - BOTTOM, stroke=GREY))
        drawn.append(_text(f"{value:g} %", across(value), height - BOTTOM + 16, anchor="middle"))
    for number, (name, *pair) in enumerate(rows):
        top = TOP + step * number
        drawn.append(_text(name, start - 6, top + 15, anchor="end"))
        for offset, value, colour in zip((2, 12), pair, (COLOURS["additive"], COLOURS["selective"]), strict=True):
            what = tag("title", f"{name}: {value:.0f} %")
            drawn.append(
                tag("rect", what, x=start, y=top + offset, width=_n(across(value) - start), height=9, fill=colour)
            )
    drawn.append(tag("line", x1=_n(across(100)), x2=_n(across(100)), y1=TOP, y2=height - BOTTOM, stroke=INK))
    drawn.append(_text(f"■ {first}", start, TOP - 12, colour=COLOURS["additive"]))
    drawn.append(_text(f"■ {second}", start + 200, TOP - 12, colour=COLOURS["selective"]))
    return _page(drawn, height)


def _free(name: str, cx: float, cy: float, taken: Sequence[tuple[float, ...]]) -> tuple[float, float, float, float]:
    """Where a label meets the fewest others: right, left, above or below its point, ever farther away."""
    wide = LETTER * len(name)
    found = []
    for far in range(5):
        for dx, dy in ((7, -LINE / 2), (-7 - wide, -LINE / 2), (-wide / 2, -7 - LINE), (-wide / 2, 7)):
            down = far * LINE * (1 if dy > 0 else -1)
            box = (cx + dx, cy + dy + down, cx + dx + wide, cy + dy + down + LINE)
            inside = LEFT <= box[0] and box[2] <= WIDTH and TOP <= box[1] and box[3] <= HEIGHT - BOTTOM
            clashes = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
            found.append((clashes + (0 if inside else 100), far, box))
    return min(found)[2]


def _room(low: float, high: float) -> tuple[float, float]:
    more = 0.05 * (high - low) or 0.5
    return low - more, high + more


def _text(what: str, x: float, y: float, *, anchor: str = "start", colour: str = INK, size: int = 12) -> Html:
    return tag("text", what, x=_n(x), y=_n(y), text_anchor=anchor, fill=colour, font_size=size)


def _n(value: float) -> str:
    return f"{value:.1f}"


def _page(drawn: Sequence[Html], height: float) -> str:
    shape: dict[str, Any] = {"viewBox": f"0 0 {WIDTH} {height:g}", "width": WIDTH, "height": f"{height:g}"}
    white = tag("rect", width="100%", height="100%", fill="#fff")
    return tag("svg", white, *drawn, xmlns="http://www.w3.org/2000/svg", font_family="sans-serif", **shape) + "\n"
