"""HTML elements that escape what they hold and always close, and numbers as a person reads them."""

from __future__ import annotations

import html
import math

MISSING = "–"


class Html(str):
    """Text that is markup already; every other string is escaped when it enters an element."""

    __slots__ = ()


def tag(name: str, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``, the same for HTML and SVG.

    Strings among ``children`` are escaped unless they are ``Html``; ``None`` is left out, as an attribute too. A
    trailing underscore in an attribute's name is dropped (``class_``), others become hyphens (``stroke_width``).
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """The children one after another, escaped unless they are ``Html``."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def table(head: list[str], rows: list[list[object]], **attributes: object) -> Html:
    """A table whose cells carry their column's name, so that a narrow screen can show each row as a card."""
    body = [tag("tr", *(cell(c, h) for h, c in zip(head, row, strict=True))) for row in rows]
    header = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in head)))
    return tag("table", header, tag("tbody", *body), **attributes)


def cell(content: object, column: str, *more: object) -> Html:
    """One cell of a table; a narrow screen leaves it out where nothing was measured."""
    return tag("td", content, *more, data_label=column, class_="missing" if content in ("", MISSING) else None)


def memory(bytes_: float | None) -> str:
    """Bytes in the binary unit that suits them, three digits or more: ``486 MiB``, ``9.81 GiB``."""
    if bytes_ is None:
        return MISSING
    value, units = float(bytes_), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    digits = 0 if units[0] == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {units[0]}"


def number(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, never cutting whole ones: ``0.8837``, ``12,345``, ``3.1e-06``."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{min(digits, 2) - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def percent(share: float | None) -> str:
    """A share of one as a percentage: ``97.5 %``."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def counted(count: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """Seconds as ``48 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{number(seconds, 2) if seconds < 10 else whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
