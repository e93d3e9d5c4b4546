"""The heat map: every pair of machine and method is a cell that says what the plans say, in well-formed markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgepeft.report import heatmap

GIB = 2**30


def candidate(method: str, peak: float, fits: bool, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "precision": "bf16",
        "microbatch": 4 if fits else 1,
        "checkpointing": False,
        "fits": fits,
        "verdict": "FITS" if fits else "NO",
        "process_bytes": int(peak * GIB),
        "phase": "forward+backward",
        "bytes": {"weights": int(peak * GIB * 0.75), "activations": int(peak * GIB * 0.25), "adapter": 0},
    } | more


def plan(machine: str, free: float, *candidates: dict[str, Any]) -> dict[str, Any]:
    return {
        "hardware": machine,
        "available_bytes": int(free * GIB),
        "model": "a <model>",
        "candidates": list(candidates),
        "choice": None,
        "why": "",
    }


FAST = {"microbatch": 33, "checkpointing": True, "update_seconds": 0.251}
LARGE = plan("large", 40, candidate("full", 30, True), candidate("lora", 10, True, **FAST))
SMALL = plan(
    "small",
    8,
    candidate("lora", 6, True, precision="nf4", microbatch=2, verdict="TIGHT"),
    candidate("lora", 10, False),
    candidate("full", 30, False),
    candidate("full", 25, False, precision="nf4"),
)


class Cells(HTMLParser):
    """Rows of (class, text) of the body's cells; fails on an element that is not closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[list[str]]] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        if name in ("meta", "link"):
            return
        self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append([dict(attributes).get("class") or "", ""])

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and {"td", "th"} & set(self.open):
            self.rows[-1][-1][1] += data + " "


def cells(page: str) -> list[list[list[str]]]:
    parser = Cells()
    parser.feed(page)
    assert not parser.open
    return parser.rows


def test_machines_and_methods_are_rows_and_columns(tmp_path: Path) -> None:
    heatmap.write([LARGE, SMALL], tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    head, small, large = cells(page)
    assert [text.strip() for _, text in head] == ["machine", "lora", "full"]  # what most machines can run comes first
    assert small[0][1].startswith("small 8.00 GiB") and large[0][1].startswith("large 40.0 GiB")
    kind, text = small[1]
    assert kind == "fit heat2" and text.startswith("2* lora, nf4 process 6.00 GiB of 8.00 GiB in forward+backward")
    assert "weights 4.50 GiB activations 1.50 GiB" in text and "adapter" not in text
    assert "about" not in text and "about 0.25 s an update (estimated)" in large[1][1]
    assert large[1][0] == "fit heat6" and "33 lora, bf16, checkpointed" in large[1][1]
    assert "3 of 4 pairs" in page


def test_what_does_not_fit_says_what_the_least_would_take(tmp_path: Path) -> None:
    heatmap.write([SMALL], tmp_path / "map.html")
    _, row = cells((tmp_path / "map.html").read_text(encoding="utf-8"))
    assert row[2][0] == "unfit" and row[2][1].startswith("no full, nf4 process 25.0 GiB of 8.00 GiB")


def test_a_method_that_was_not_tried_is_a_dash() -> None:
    page = str(heatmap.body([LARGE, plan("tiny", 1, candidate("lora", 10, False))]))
    assert cells(page)[1][2][0] == "untried"


def test_the_page_is_alone_and_escaped(tmp_path: Path) -> None:
    heatmap.write([LARGE], tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "a &lt;model&gt;" in page and "a <model>" not in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and "src=" not in page
    assert 'name="viewport"' in page


@pytest.mark.parametrize(("microbatch", "shade"), [(1, 1), (3, 2), (4, 3), (31, 5), (1024, 6)])
def test_more_room_is_darker(microbatch: int, shade: int) -> None:
    page = str(heatmap.body([plan("one", 40, candidate("lora", 1, True, microbatch=microbatch))]))
    assert cells(page)[1][1][0] == f"fit heat{shade}"
