"""Trained parameters against those of the survey (Lialin et al., arXiv 2303.15647v2, tables 4 and 5), to the digit.

The survey took LoRA from HF peft (rank 8) and the other methods from the AdapterHub library, with its defaults.

Usage: ``python benchmarks/survey_counts.py``: ``results/survey_counts.md``. Models are made without memory; seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgepeft import adapter, backbone
from edgepeft.files import write_text
from edgepeft.methods import base

RESULTS = Path(__file__).resolve().parent / "results" / "survey_counts.md"
SIZES = ("t5-large", "t5-3b", "t5-11b")
# The survey's row: the method and options that it stands for, and the millions it printed for the three sizes.
ROWS: dict[str, tuple[str, dict[str, Any], tuple[float, float, float]]] = {
    "Full tuning": ("full", {}, (737.67, 2851.6, 11307.32)),
    "Adapters (Houlsby)": ("houlsby", {"reduction": 16}, (12.69, 12.69, 12.69)),
    "Adapters (Pfeiffer)": ("pfeiffer", {"reduction": 16}, (6.34, 6.34, 6.34)),
    "Parallel Adapter": ("parallel", {"reduction": 2}, (50.41, 50.41, 50.41)),
    "(IA)3": ("ia3", {}, (0.34, 1.38, 3.48)),
    "Prefix tuning": ("prefix_tuning", {}, (77.31, 77.25, 1211.99)),
    "Prompt tuning": ("prefix_tuning", {"bottleneck": 0}, (4.42, 17.69, 70.78)),
    "LN tuning": ("ln_tuning", {}, (0.12, 0.12, 0.12)),
    "LoRA (q and v)": (
        "lora",
        {"rank": 8, "targets": ("query", "value", "cross_query", "cross_value")},
        (2.36, 3.93, 20.05),
    ),
    "LoRA (all linear)": ("lora", {"rank": 8}, (8.65, 25.17, 91.23)),
    "KronA": (  # HF peft's LoKr: of the Kronecker factors, the larger is itself of rank 8
        "krona",
        {"rank": 8, "targets": ("query", "value", "cross_query", "cross_value")},
        (0.22, 0.41, 0.77),
    ),
    "Compacter": ("compacter", {}, (0.3, 0.3, 0.3)),
    "Compacter++": ("compacter_pp", {}, (0.15, 0.15, 0.15)),
    "MAM": ("mam", {}, (171.07, 171.07, 1262.39)),
    "UniPELT": ("unipelt", {}, (86.22, 316.7, 1224.78)),
}
# The row "Prompt tuning" grows with the width of attention, and a prompt before the input does not. It is to the digit
# what 30 keys and values before each of 72 attentions take: a prefix without the network that makes it.
# Rows that do not follow from the shapes of their own model: what those give, and where the printed number may be from.
UNREACHED = {
    ("LoRA (q and v)", "t5-3b"): (
        5.90,
        "8 · (1024 + 4096) · 2 in 72 attentions; the printed 3.93 is that of 48 of them",
    ),
    ("(IA)3", "t5-11b"): (5.51, "2 · 16384 in 72 attentions and 65536 in 48 feed-forwards; 3.48 is no sum of these"),
    ("Prefix tuning", "t5-3b"): (
        304.25,
        "keys and values are 4096 wide; the printed 77.25 is that of a width of 1024 and UniPELT's 10 tokens",
    ),
    ("MAM", "t5-3b"): (525.41, "keys and values are 4096 wide; the printed 171.07 is that of 1024, as in T5-large"),
    ("MAM", "t5-11b"): (1942.75, "the printed 1262.39 is that of a network 512 wide, where T5-large's is 800"),
    ("UniPELT", "t5-11b"): (1238.59, "the printed 1224.78 is that of Houlsby's two adapters a layer, without LoRA"),
}

ABOUT = """\
Millions, of tables 4 and 5 (arXiv 2303.15647v2), and what edgepeft trains in the same models with the settings that the
survey's libraries had: LoRA and KronA from HF peft, the others from AdapterHub. Counted and printed agree to the last
digit where one number stands.
"""
HEADER = "| the survey's row | edgepeft's method | T5-large | T5-3B | T5-11B |\n|---|---|--:|--:|--:|"


def trained(size: str, name: str, options: dict[str, Any]) -> int:
    with torch.device("meta"):
        made = backbone.skeleton(backbone.config(backbone.resolve(size)), task="seq2seq", at="fp32")
        base.apply(base.create(name, options), made)
    return sum(parameter.numel() for parameter in adapter.trained(made.model).values())


def report() -> str:
    """Every row as Markdown, and why some printed numbers are not reached."""
    lines = ["# Trained parameters, as the survey prints them", "", ABOUT, HEADER]
    for row, (name, options, printed) in ROWS.items():
        counted = [f"{trained(size, name, options) / 1e6:.2f}" for size in SIZES]
        cells = [
            here if float(here) == there else f"**{here}** ({there:g} printed)"
            for here, there in zip(counted, printed, strict=True)
        ]
        chosen = ", ".join(f"{key} = {_plain(value)}" for key, value in options.items()) or "defaults"
        lines.append(f"| {row} | `{name}`, {chosen} | {' | '.join(cells)} |")
    lines += ["", "Not reached, because the printed number does not follow from the shapes of its own model:", ""]
    lines += [
        f"- {row}, {size}: counted {there:.2f}. {why[0].upper()}{why[1:]}."
        for (row, size), (there, why) in UNREACHED.items()
    ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    write_text(RESULTS, report())
    print(RESULTS.read_text(encoding="utf-8"))
