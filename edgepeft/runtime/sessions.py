"""ONNX graphs, loaded by onnxruntime and run by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgepeft.errors import EdgePeftError
from edgepeft.runtime.manifest import GRAPHS

_FATAL_ONLY = 4  # errors are raised; printed too, they would come twice


class Graph:
    """One ONNX graph on the CPU.

    Args:
        path: the .onnx file; external weights lie beside it.
        threads: threads within one operator; None lets onnxruntime take one per physical core.

    Raises:
        EdgePeftError: onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL_ONLY
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise EdgePeftError(
                f"{path} could not be loaded by onnxruntime {ort.__version__}.",
                _first_line(error),
                "If the file came here by copy, copy it again; otherwise export again.",
            ) from error
        self.path = path
        self.inputs: dict[str, Any] = {node.name: node for node in self._session.get_inputs()}
        self.outputs: dict[str, Any] = {node.name: node for node in self._session.get_outputs()}

    def run(self, feed: Mapping[str, NDArray[Any] | ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """All outputs by name. They stay in onnxruntime's memory, so feeding one back in copies nothing.

        Raises:
            EdgePeftError: onnxruntime fails, or the names or shapes are not those of the graph.
        """
        values = {name: _value(array) for name, array in feed.items()}
        try:
            outputs = self._session.run_with_ort_values(list(self.outputs), values)
        except Exception as error:
            raise EdgePeftError(
                f"{self.path} failed while it ran.",
                _first_line(error),
                "If memory is short, use a shorter input; otherwise export again.",
            ) from error
        return dict(zip(self.outputs, outputs, strict=True))


def open_graphs(directory: Path, task: str, threads: int | None = None) -> dict[str, Graph]:
    """The graphs of a task by the stem of their file: "model", or "encoder" and "decoder".

    Raises:
        EdgePeftError: a graph is missing or cannot be loaded.
    """
    graphs = {}
    for name in GRAPHS[task]:
        path = directory / name
        if not path.is_file():
            needs = f"A {task} model needs {', '.join(GRAPHS[task])}."
            raise EdgePeftError(f"{path} is missing.", needs, "Export again.")
        graphs[path.stem] = Graph(path, threads)
    return graphs


def _value(array: NDArray[Any] | ort.OrtValue) -> ort.OrtValue:
    if isinstance(array, ort.OrtValue):
        return array
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
