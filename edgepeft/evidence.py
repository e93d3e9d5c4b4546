"""What others measured of the methods' quality. It is shown beside a plan with its source, and promises nothing."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


def of(method: str) -> list[str]:
    """One line for each source that has the method; the sources may disagree."""
    found = []
    scores = [(model, values[method]) for model, values in _data()["survey"]["scores"].items() if method in values]
    if scores:
        found.append("survey " + ", ".join(f"{model} {score:.1f}" for model, score in scores))
    if method in _data()["metamath"]["accuracy"]:
        low, high, count = _data()["metamath"]["accuracy"][method]
        found.append(f"MetaMathQA {low:.1%} to {high:.1%} in {count} runs")
    return found


def sources() -> dict[str, str]:
    """What the scores are, and where they are from."""
    return {name: part["source"] for name, part in _data().items()}


@cache
def _data() -> dict[str, Any]:
    text = files("edgepeft").joinpath("evidence.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
