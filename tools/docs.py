"""Writes docs/methods.md and docs/recipe.md from the code; with ``--check`` only says whether they are up to date.

Usage: ``python tools/docs.py [--check]``.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from itertools import groupby
from pathlib import Path
from typing import Any

from edgepeft import recipe, taxonomy
from edgepeft.errors import EdgePeftError
from edgepeft.files import write_text
from edgepeft.methods import base

DOCS = Path(__file__).resolve().parent.parent / "docs"
METHODS = """# Methods

Made by `python tools/docs.py` from the files in `edgepeft/methods/`. Kinds are those of the survey (Lialin et al.,
arXiv 2303.15647). What a method saves is compared with full tuning: *disk* for what it leaves, *memory* in training,
*backpropagation* through the backbone. A method that merges costs nothing at inference: it becomes part of the weights.
"""

RECIPE = """# The recipe

Made by `python tools/docs.py` from `edgepeft/recipe.py`. A recipe is all that decides a run. `edgepeft plan --recipe`
writes one, a run keeps its own as `recipe.toml`, and `edgepeft run --recipe` begins another from it. Each key is also
set by `--set key=value`, which counts more than the file and than flags such as `--task`:

```
--set epochs=3                       a number
--set checkpointing=true             true or false
--set schedule=linear                text
--set 'variants=["int8","int4"]'     a list of names: export in 4 bits too; one name needs no brackets
--set columns.text=review            a key of a table
--set options.rank=16
```

What has no default is chosen by the plan, or not there unless it is given.

| key | type | default | |
|---|---|---|---|
"""


def methods_page() -> str:
    """The whole of docs/methods.md."""
    found = taxonomy.catalogue()
    parts = [METHODS]
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


def recipe_page() -> str:
    """The whole of docs/recipe.md."""
    said, hints = taxonomy.meanings(recipe.Recipe), typing.get_type_hints(recipe.Recipe)
    rows = []
    for field in dataclasses.fields(recipe.Recipe):
        default = "must be given" if field.name in ("model", "data") else ""
        if field.default not in (dataclasses.MISSING, None):
            default = f"`{recipe.assignment('', field.default).removeprefix('=')}`"
        rows.append(
            f"| `{field.name}` | {recipe.in_words(hints[field.name])} | {default} | {_cell(said[field.name])} |"
        )
    return RECIPE + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(arguments: list[str]) -> None:
    for name, made in (("methods.md", methods_page()), ("recipe.md", recipe_page())):
        page = DOCS / name
        if arguments != ["--check"]:
            write_text(page, made)
        elif not page.exists() or page.read_text(encoding="utf-8") != made:
            raise EdgePeftError(f"docs/{name} is not what the code says.", "", "Run: python tools/docs.py")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgePeftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
