"""The config.json of well-known models, so that planning works without a network. One ``<name>.json`` is one model.

A file holds the fields that transformers reads, with the values published on the Hugging Face hub, and ``"_edgepeft"``:

- ``hub_id``: the model's repository; ``aliases``: other names whose weights have the same shapes, rotary embedding and
  length (instruct versions; their special tokens may differ);
- ``parameters``: how many there are, a tied tensor counted once, of an encoder without a task's head;
- ``task``: what it is most often fine-tuned for; ``source``: where the values are from;
- ``same_sizes_as``, if there is one: the model whose traces hold here too, as nothing that takes memory differs.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


def names() -> list[str]:
    """The names of all models in the catalogue, sorted."""
    return sorted(file.name.removesuffix(".json") for file in files(__name__).iterdir() if file.name.endswith(".json"))


def entry(name: str) -> dict[str, Any] | None:
    """The config.json fields and ``"_edgepeft"`` of the model called ``name``, or None when the catalogue lacks it.

    Args:
        name: a name of :func:`names`, a hub id or an alias, in any case: ``t5-11b``, ``meta-llama/Llama-3.2-3B``.

    Returns:
        A dictionary of the caller's own: transformers writes into the nested ones it is given.
    """
    known = _index().get(name.casefold())
    return None if known is None else _read(known)


def traced_as(name: str) -> str:
    """The model of the catalogue whose traces hold for the one called ``name``: itself, unless it says another."""
    about = _read(name)["_edgepeft"]
    return str(about.get("same_sizes_as", name))


@cache
def _index() -> dict[str, str]:
    """Every way to call a model, in lower case, to its name."""
    index: dict[str, str] = {}
    for name in names():
        about = _read(name)["_edgepeft"]
        index.update((called.casefold(), name) for called in (name, about["hub_id"], *about["aliases"]))
    return index


def _read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return config
