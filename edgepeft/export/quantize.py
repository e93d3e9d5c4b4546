"""Smaller graphs: int8 and int4 weights for onnxruntime."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgepeft.files import atomic_directory
from edgepeft.runtime.manifest import GRAPHS

VARIANTS = ("int8", "int4")
BLOCK = 32  # weights per scale of MatMulNBits
ACCURACY = 4  # int8 arithmetic in MatMulNBits; without it the kernel is up to sixty times slower
_SCOPES = "pkg.torch.onnx.name_scopes"


def quantize(source: Path, variant: str, task: str, target: Path) -> None:
    """Write a quantised copy of the fp32 graphs in ``source`` to ``target``.

    int8 for classifiers and encoder-decoders quantises activations too (dynamic quantisation, 2 to 3 times as fast);
    generators, and everything at int4, keep activations in fp32 and store weights in blocks (MatMulNBits). Embeddings become
    int8 with a scale per row, shared with nothing else: a tied head is quantised on its own. T5's ``wo`` stays fp32: its
    outliers do not survive.
    """
    with atomic_directory(target) as folder:
        for name in GRAPHS[task]:
            model = onnx.load(source / name)
            _untie_head(model)
            excluded = [node.name for node in model.graph.node if _is_wo(node)]
            _quantize_embeddings(model)
            if variant == "int8" and task != "causal-lm":
                model = _dynamic(model, excluded)
            else:
                model = _blockwise(model, {"int8": 8, "int4": 4}[variant], excluded)
            for node in model.graph.node:
                del node.metadata_props[:]  # traces of the machine that exported
            onnx.save(model, folder / name, save_as_external_data=True, location=f"{name}.data")
            (folder / f"{name}.data").chmod(0o644)  # onnx keeps it to the user who exported


def _dynamic(model: onnx.ModelProto, excluded: list[str]) -> onnx.ModelProto:
    """Unsigned weights: with signed ones, CPUs without VNNI overflow and lose accuracy."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        plain, made = Path(scratch) / "plain.onnx", Path(scratch) / "quantized.onnx"
        onnx.save(model, plain, save_as_external_data=True, location="plain.data")
        with _quiet():
            quantize_dynamic(
                plain,
                made,
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QUInt8,
                per_channel=True,
                nodes_to_exclude=excluded,
                use_external_data_format=True,
            )
        return onnx.load(made)


def _blockwise(model: onnx.ModelProto, bits: int, excluded: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    # Asymmetric int4 loses less; at 8 bits there is nothing to gain (SmolLM2-135M: loss 2.416 against 2.554).
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=bits == 8, accuracy_level=ACCURACY, bits=bits, op_types_to_quantize=("MatMul",)
    )
    quantizer = MatMulNBitsQuantizer(model, bits=bits, algo_config=config, nodes_to_exclude=excluded)
    with _quiet():
        quantizer.process()
    return quantizer.model.model  # type: ignore[no-any-return]


def _untie_head(model: onnx.ModelProto) -> None:
    """A tied head is MatMul(h, Transpose(embedding)), whose weight no quantiser recognises as constant: transpose it here."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights and len(weights[node.input[0]].dims) == 2:
            transposed = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).T)
            model.graph.initializer.append(numpy_helper.from_array(transposed, node.output[0]))
            model.graph.node.remove(node)
    _drop_unused(model)


def _quantize_embeddings(model: onnx.ModelProto) -> None:
    """Gather(table, ids) → Cast(Gather(int8 table, ids)) · Gather(scales, ids), for tables of fp32 rows."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if table is None or len(table.dims) != 2 or axis != 0 or table.data_type != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(table)
        scale = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
        name, ids, output = f"{table.name}.int8", node.input[1], node.output[0]
        model.graph.initializer.append(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), name))
        model.graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
        nodes += [
            helper.make_node("Gather", [name, ids], [f"{output}.int8"], f"{node.name}.int8"),
            helper.make_node("Cast", [f"{output}.int8"], [f"{output}.fp32"], f"{node.name}.cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scale", ids], [f"{output}.scale"], f"{node.name}.scale"),
            helper.make_node("Mul", [f"{output}.fp32", f"{output}.scale"], [output], f"{node.name}.mul"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused(model)


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    del model.graph.value_info[:]  # shapes of tensors that are gone, which shape inference would trip over
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _is_wo(node: onnx.NodeProto) -> bool:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    return node.op_type == "MatMul" and ".DenseReluDense.wo'" in scopes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantisers log every node."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
