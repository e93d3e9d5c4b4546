"""Smaller and faster graphs: linear layers and embeddings in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from edgepeft.errors import EdgePeftError, UsageError, nearest
from edgepeft.export.packing import BLOCK, quantize_blocks, quantize_channels
from edgepeft.export.translate import save
from edgepeft.files import atomic_directory

BITS = {"int8": 8, "int4": 4}
MICROSOFT = "com.microsoft"
INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level: activations in int8, by block. The default multiplies in fp32, 2 to 60 times slower."""

PROTECTED = "wo"
"""T5's second feed-forward projection; its inputs have outliers that no 8-bit scale can hold."""

SMALLEST = 32
"""A linear layer or table with a side shorter than this stays fp32: a classifier's head is small, and decides."""


def quantize(source: Path, variant: str, task: str, target: Path) -> list[Path]:
    """Make the ``variant`` ("int8" or "int4") of the fp32 graphs in ``source``.

    - int8 of classification and seq2seq: weights by channel, and activations by tensor when the graph runs; fastest
      where many tokens are read at once.
    - int8 of causal-lm, and int4: weights by block (MatMulNBits); fastest where tokens come one by one.
    - Embeddings, and heads tied to them, are in 8-bit blocks in every variant and are stored once. In 4 bits a tied
      head costs SmolLM2 0.13 nats a token of divergence from fp32, beside 0.34 for all its layers; in 8 bits, nothing.

    Returns:
        The new graphs in ``target``, which is replaced whole.

    Raises:
        UsageError: there is no such variant.
        EdgePeftError: a graph in ``source`` is missing or damaged.
    """
    if variant not in BITS:
        raise UsageError(f"Unknown variant {variant!r}.", remedy=nearest(variant, BITS))
    paths = sorted(source.glob("*.onnx"))
    if not paths:
        raise EdgePeftError(
            f"{source} holds no ONNX graph.", "Variants are made from the fp32 graphs.", "Export again."
        )
    by_channel = variant == "int8" and task != "causal-lm"
    with atomic_directory(target) as folder:
        for path in paths:
            model = _load(path)
            editor = _Editor(model.graph)
            tables = {node.inputs[0] for node in model.graph if _is_lookup(node)}
            for linear in _linears(model.graph):
                if linear.weight in tables:
                    editor.blockwise(linear, bits=8)
                elif by_channel:
                    editor.by_channel(linear)
                else:
                    editor.blockwise(linear, bits=BITS[variant])
            for gather in [node for node in model.graph if _is_lookup(node)]:
                editor.lookup(gather)
            model.opset_imports[MICROSOFT] = 1
            passes.RemoveUnusedNodesPass()(model)
            passes.NameFixPass()(model)
            save(model, folder / path.name)
    return [target / path.name for path in paths]


@dataclass(frozen=True)
class _Linear:
    """A node that computes input · weightᵀ + bias.

    Attributes:
        weight: the initializer, float32.
        transposed: whether it is stored (inputs, outputs).
    """

    node: ir.Node
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None

    def matrix(self) -> NDArray[np.float32]:
        """The weight, (outputs, inputs)."""
        stored = _array(self.weight)
        return stored.T if self.transposed else stored


class _Editor:
    """Replaces nodes of one graph; what two nodes share is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._packed: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value]] = {}
        self._activations: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def blockwise(self, linear: _Linear, bits: int) -> None:
        """Weights in blocks."""
        matrix = linear.matrix()
        outputs, inputs = matrix.shape
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": INT8_ACTIVATIONS}
        tape = ir.tape.Tape()
        packed = self._pack(linear.weight, matrix, bits)
        product = tape.op("MatMulNBits", [linear.node.inputs[0], *packed], attributes, domain=MICROSOFT)
        self._replace(linear.node, tape, _biased(tape, product, linear.bias))

    def by_channel(self, linear: _Linear) -> None:
        """Weights by channel, and activations rounded when the graph runs."""
        matrix, scales = quantize_channels(linear.matrix())
        name, source = f"{linear.weight.name}_int8", linear.node.inputs[0]
        assert source is not None
        tape = ir.tape.Tape()
        if source not in self._activations:
            self._activations[source] = tuple(tape.op_multi_out("DynamicQuantizeLinear", [source], num_outputs=3))
        integers, scale, zero = self._activations[source]
        sums = tape.op("MatMulInteger", [integers, self._add(name, matrix), zero])
        scales_of_both = tape.op("Mul", [scale, self._add(f"{name}_scales", scales)])
        product = tape.op("Mul", [tape.op("Cast", [sums], {"to": ir.DataType.FLOAT}), scales_of_both])
        self._replace(linear.node, tape, _biased(tape, product, linear.bias))

    def lookup(self, gather: ir.Node) -> None:
        """An embedding in 8-bit blocks."""
        table, indices = gather.inputs
        assert table is not None
        matrix = _array(table)
        data, scales = self._pack(table, matrix, bits=8)
        tape = ir.tape.Tape()
        shape = self._add(f"{table.name}_shape_of_{gather.name}", np.array(matrix.shape, np.int64))
        attributes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        rows = tape.op("Reshape", [data, shape])
        found = tape.op("GatherBlockQuantized", [rows, indices, scales], attributes, domain=MICROSOFT)
        self._replace(gather, tape, found)

    def _pack(self, weight: ir.Value, matrix: NDArray[np.float32], bits: int) -> tuple[ir.Value, ir.Value]:
        if (weight, bits) not in self._packed:
            data, scales = quantize_blocks(matrix, bits)
            name = f"{weight.name}_{bits}bits"
            self._packed[weight, bits] = self._add(name, data), self._add(f"{name}_scales", scales)
        return self._packed[weight, bits]

    def _add(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def _replace(self, node: ir.Node, tape: ir.tape.Tape, output: ir.Value) -> None:
        for made in tape.nodes:
            made.name = f"{_module(node)}/{made.op_type}"
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], tape.nodes, node.outputs, [output])


def _biased(tape: ir.tape.Tape, product: ir.Value, bias: ir.Value | None) -> ir.Value:
    return product if bias is None else tape.op("Add", [product, bias])


def _load(path: Path) -> ir.Model:
    """A graph whose weights are read from disk when they are needed."""
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            _array(value)
    except Exception as error:  # protobuf, onnx_ir and mmap each have their own
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise EdgePeftError(f"{path} is damaged.", cause, "Export again.") from error
    return model


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_matrix(value: ir.Value | None) -> bool:
    """Whether this is a stored fp32 matrix worth quantising."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    tensor = value.const_value
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and min(tensor.shape.numpy()) >= SMALLEST


def _is_lookup(node: ir.Node) -> bool:
    """Whether rows of a stored table are gathered whose width is a whole number of blocks."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0 or not _is_matrix(node.inputs[0]):
        return False
    table: Any = node.inputs[0]  # not None: it is a matrix
    return bool(_array(table).shape[1] % BLOCK == 0)


def _linears(graph: ir.Graph) -> list[_Linear]:
    found = (_as_linear(node) for node in graph)
    return [linear for linear in found if linear is not None and PROTECTED not in _module(linear.node).split(".")]


def _as_linear(node: ir.Node) -> _Linear | None:
    inputs: Any = node.inputs  # None only where an input is left out, which these operators cannot
    if node.op_type == "MatMul":
        weight, producer = inputs[1], inputs[1].producer()
        if _is_matrix(weight):
            return _Linear(node, weight, True, None)
        if producer is not None and producer.op_type == "Transpose" and _is_matrix(producer.inputs[0]):
            return _Linear(node, producer.inputs[0], False, None)
    if node.op_type == "Gemm" and _is_matrix(inputs[1]):
        plain = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
        if plain and not node.attributes.get_int("transA", 0):
            bias = inputs[2] if len(inputs) > 2 else None
            return _Linear(node, inputs[1], not node.attributes.get_int("transB", 0), bias)
    return None


def _module(node: ir.Node) -> str:
    """Dotted name of the module that a node came from."""
    return (node.name or "").rpartition("/")[0]
