"""What is drawn stands where the numbers say, and numbers read as people write them."""

from __future__ import annotations

import math
import random
import re

import pytest

from edgepeft.report.figures import Series, curve, smoothed, stacked_bar, thinned, ticks
from edgepeft.report.markup import memory, number, tag

MIB = 2**20


def test_a_bar_longer_than_the_scale_is_marked_as_cut() -> None:
    assert "▸" in stacked_bar({"weights": 60, "optimizer": 60}, 100, 50, "")
    assert "▸" not in stacked_bar({"weights": 60, "optimizer": 40}, 100, 50, "")


def test_curve_puts_points_where_the_axes_say() -> None:
    drawn = curve([Series("a", [(10, 1.0), (20, 3.0), (30, 2.0)], "dots")], "", 40)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)%" cy="([\d.]+)%"', drawn)]
    labels = {
        float(value): float(y) for y, value in re.findall(r'<text x="0%" y="([\d.]+)%"[^>]*>([\d.]+)</text>', drawn)
    }
    assert [x for x, _ in dots] == [25, 50, 75]
    assert dots[1][1] < dots[2][1] < dots[0][1]  # a larger value stands higher
    assert [y for _, y in dots] == pytest.approx([labels[v] for v in (1, 3, 2)], abs=0.02)
    upright = {float(v): float(x) for x, v in re.findall(r'<text x="([\d.]+)%" y="100%"[^>]*>([\d.]+)</text>', drawn)}
    assert upright[10] == 25 and upright[20] == 50 and upright[40] == 100


@pytest.mark.parametrize("points", [[(1, 0.5)], [(0, 0.5)], [(1, 0.0), (2, 0.0)], [(7, -3.0), (8, 1e9)]])
def test_curve_of_degenerate_points(points: list[tuple[float, float]]) -> None:
    drawn = curve([Series("a", points, "line")], "", int(points[-1][0]))
    positions = [float(p) for pair in re.search(r'points="([^"]+)"', drawn)[1].split() for p in pair.split(",")]  # type: ignore[index]
    assert len(positions) == 2 * len(points) and all(0 <= p <= 100 for p in positions)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.281, 0.733), (1, 400), (-3, 1e9), (1e-7, 3e-7), (99.5, 100.5)])
def test_ticks_are_round_inside_and_evenly_apart(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    gaps = {round((b - a) / (found[1] - found[0]), 3) for a, b in zip(found, found[1:], strict=False)}
    assert gaps == {1.0}
    assert f"{found[1] - found[0]:e}"[:8] in ("1.000000", "2.000000", "5.000000")


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    kept = thinned(points)
    assert len(kept) <= 800 and kept == sorted(kept) and (4321.0, 50.0) in kept and set(kept) <= set(points)


def test_smoothing_has_no_bias_and_less_noise() -> None:
    noise = random.Random(1)
    level = [(float(i), 2.0 + noise.gauss(0, 0.3)) for i in range(900)]
    result = [y for _, y in smoothed(level)]
    assert result[0] == pytest.approx(level[0][1])
    assert max(abs(y - 2.0) for y in result[100:]) < 0.3
    assert [y for _, y in smoothed([(0.0, 5.0), (1.0, 5.0)])] == pytest.approx([5.0, 5.0])


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (486 * MIB, "486 MiB"), (105 * 2**30, "105 GiB")],
)
def test_memory_in_words(bytes_: int | None, text: str) -> None:
    assert memory(bytes_) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.88371, "0.8837"), (12345, "12,345"), (12345.678, "12,346"), (3.12e-7, "3.1e-07"), (0.0, "0")],
)
def test_numbers_in_words(value: float | None, text: str) -> None:
    assert number(value) == text


def test_tag_escapes_text_and_attributes_but_not_elements() -> None:
    assert tag("p", "<i>", tag("b", "&"), None, class_='"x"', id=None) == (
        '<p class="&quot;x&quot;">&lt;i&gt;<b>&amp;</b></p>'
    )
