"""ONNX graphs of the tiny models, each exported once per test run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import onnx
import tiny
from transformers import PreTrainedModel

from edgepeft.export.onnx import export
from edgepeft.export.quantize import quantize
from edgepeft.runtime.sessions import Graph, open_graphs


@cache
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="edgepeft-graphs-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def model(name: str) -> PreTrainedModel:
    """A family's tiny model, or ``<family>+<method>``: one with an unmerged method in it, all of it randomised."""
    family, _, method = name.partition("+")
    if not method:
        return tiny.model(family)
    made = tiny.adapted(family, method)[0].model
    tiny.randomise(made)
    return made.eval()


def task(name: str) -> str:
    return tiny.task(name.partition("+")[0])


def exported(name: str, variant: str = "fp32") -> Path:
    """The folder of a model's graphs. Read only: tests share it."""
    return _exported(name, variant)


def graphs(name: str, variant: str = "fp32") -> dict[str, Graph]:
    return _graphs(name, variant)


# A cache tells f("t5") from f("t5", "fp32"); so these two have no defaults.
@cache
def _exported(name: str, variant: str) -> Path:
    target = _folder() / name / variant
    if variant == "fp32":
        export(model(name), task(name), target)
    else:
        quantize(exported(name), variant, task(name), target)
    return target


@cache
def _graphs(name: str, variant: str) -> dict[str, Graph]:
    return open_graphs(_exported(name, variant), task(name), threads=1)


def structure(name: str, graph: str, variant: str = "fp32") -> onnx.GraphProto:
    """A graph's nodes and the shapes of its weights, without the weights."""
    return onnx.load(exported(name, variant) / f"{graph}.onnx", load_external_data=False).graph
