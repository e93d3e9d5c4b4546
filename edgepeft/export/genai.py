"""A decoder's graph from ONNX Runtime GenAI's builder: in seconds, without a trace, and with fused attention."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgepeft.errors import EdgePeftError
from edgepeft.export.translate import save
from edgepeft.files import atomic_directory

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Of those the builder knows, the ones whose graphs are held against torch in the tests."""


def buildable(model: Path) -> bool:
    """Whether the builder is installed (``edgepeft[genai]``) and knows the model in this Hugging Face folder."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return False
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return any(name in ARCHITECTURES for name in config.get("architectures") or [])


def build(model: Path, directory: Path) -> list[Path]:
    """Write the fp32 ``model.onnx`` of a merged model (with its tokenizer), named like that of ``onnx.export``.

    Two differences: there is no input position_ids, since attention counts from the mask; so a batch of prompts must
    be padded on the right, or be one prompt.

    Raises:
        EdgePeftError: the builder failed.
    """
    with atomic_directory(directory) as folder:
        raw = folder / "raw"
        # The command is the interface that stays; the function behind it changes with every release.
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(raw)]
        done = subprocess.run(
            [*command, "-p", "fp32", "-e", "cpu", "-c", str(folder)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["It did not say why."])[-1]
            remedy = "Run `pip uninstall onnxruntime-genai` and export again: edgepeft then traces the model itself."
            raise EdgePeftError(f"ONNX Runtime GenAI could not export {model}.", cause, remedy)
        graph = ir.load(raw / "model.onnx")
        _fix_cache_sizes(graph.graph, json.loads((raw / "genai_config.json").read_text(encoding="utf-8")))
        _store_by_row(graph.graph)
        save(graph, folder / "model.onnx")
        for file in raw.iterdir():
            file.unlink()
        raw.rmdir()
    return [directory / "model.onnx"]


def _fix_cache_sizes(graph: ir.Graph, config: dict[str, dict[str, dict[str, int]]]) -> None:
    """The builder leaves the head size open; a runtime that makes an empty cache needs the number."""
    heads, size = config["model"]["decoder"]["num_key_value_heads"], config["model"]["decoder"]["head_size"]
    for value in (*graph.inputs, *graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")):
            assert value.shape is not None
            value.shape = ir.Shape([value.shape[0], heads, value.shape[2], size])


def _store_by_row(graph: ir.Graph) -> None:
    """Store a tied embedding (vocabulary, hidden), transposed for the head: the builder does it the other way round."""
    for gather in [node for node in graph if node.op_type == "Gather"]:
        transpose = gather.inputs[0].producer() if gather.inputs[0] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        (table,), (turned,) = transpose.inputs, transpose.outputs
        assert table is not None and table.const_value is not None
        rows = np.ascontiguousarray(table.const_value.numpy().T)
        table.const_value, table.shape = ir.tensor(rows, name=table.name), ir.Shape(rows.shape)
        turned.shape = ir.Shape(rows.shape[::-1])
        for node, index in list(table.uses()):
            if node is not transpose:
                node.replace_input_with(index, turned)
        gather.replace_input_with(0, table)
