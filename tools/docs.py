"""Writes docs/methods.md from the methods themselves; with ``--check`` only says whether it is up to date.

Usage: ``python tools/docs.py [--check]``.
"""

from __future__ import annotations

import inspect
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from edgepeft import taxonomy
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_text
from edgepeft.methods import base

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = """# Methods

Made by `python tools/docs.py` from the files in `edgepeft/methods/`. Kinds are those of the survey (Lialin et al.,
arXiv 2303.15647). What a method saves is compared with full tuning: *disk* for what it leaves, *memory* in training,
*backpropagation* through the backbone. A method that merges costs nothing at inference: it becomes part of the weights.
"""


def page() -> str:
    """The whole of docs/methods.md."""
    found = taxonomy.catalogue()
    parts = [HEAD]
    for kind, methods in groupby(found, key=lambda each: each["kind"]):
        parts.append(f"## {kind.capitalize()}\n")
        rows = [_row(each) for each in methods]
        parts.append("| method | | merges | saves | at inference |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join([*parts, *map(_section, found)])


def _row(each: dict[str, Any]) -> str:
    merges, saves = "yes" if each["merges"] else "no", ", ".join(each["saves"]) or "nothing"
    link = f"[{each['name']}](#{each['name']})"
    return f"| {link} | {_cell(each['summary'])} | {merges} | {saves} | {each['overhead'] or 'nothing'} |"


def _section(each: dict[str, Any]) -> str:
    method = base.find(each["name"])
    paper = method.paper
    where = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.venue
    rows = [f"| `{o['name']}` | `{o['default']!r}` | {_cell(o['meaning'])} |" for o in each["options"]]
    rows.append(f"| `lr` | `{each['learning_rate']:g}` | Learning rate a run starts from (`--set lr=...`). |")
    aliases = [f"`{alias}` is `{each['name']}` on {at}." for alias, at in each["aliases"].items()]
    return "\n".join(
        [
            f"## {each['name']}\n",
            f"*{paper.title}* ({paper.year}), {where}.\n",
            inspect.cleandoc(method.__doc__ or "") + "\n",
            *(f"{alias}\n" for alias in aliases),
            f"Several GPUs: {', '.join(map(str.upper, each['strategies'])) or 'no'}.\n",
            "| option | default | |\n|---|---|---|",
            *rows,
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> None:
    made = page()
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            raise EdgePeftError("docs/methods.md is not what the methods say.", "", "Run: python tools/docs.py")
        return
    write_text(PAGE, made)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
