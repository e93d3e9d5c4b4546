"""One module becomes one ONNX file, without the parts of torch's exporter that cost most and change nothing."""

from __future__ import annotations

import ast
import errno
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.onnx import OnnxExporterError, ONNXProgram

from edgepeft.errors import EdgePeftError

Axes = dict[int, str]
"""Names of the axes whose size is free, by their number."""

FOLDED_ELEMENTS = 1024
"""Larger constants that several nodes read are not folded: a head tied to the embedding would be stored twice."""

aten = torch.ops.aten
_ASSERTIONS = {aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten._assert_async.msg}
# Operators that return their input's values, at most in another dtype.
_COPIES = {
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
}
_SYNONYMS = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.min.other: aten.minimum.default}
_IN_PLACE = {aten.add_.Tensor: aten.add.Tensor}


@dataclass(frozen=True)
class Graph:
    """What to translate.

    Attributes:
        name: of the file, without ``.onnx``.
        module: takes the inputs as positional arguments, returns the outputs.
        inputs: an example of each input, and its free axes; sizes of different axes differ and exceed one.
        outputs: names of the outputs.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Axes]]
    outputs: list[str]


def write(graph: Graph, path: Path) -> None:
    """Trace ``graph`` and save it as ONNX, its weights in ``<path>.data``.

    ``torch.onnx.export`` alone would do, in two to three times the time: it traces the module, traces the result again
    to decompose operators (nearly all of which ONNX can express as they are), then tries a hundred rewrite rules on
    every node. Here the first trace is tidied so that the second is not needed, and the rules are left out: constant
    folding and the removal of duplicates give the same kernels, and onnxruntime optimises every graph it loads.

    Raises:
        EdgePeftError: torch cannot trace the module or cannot express it in ONNX.
    """
    examples = tuple(example for example, _ in graph.inputs.values())
    axes = [axes for _, axes in graph.inputs.values()]
    # The fused attention of CPUs returns strides that cannot be viewed as the shape that is traced.
    with _quiet(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            program = _trace(graph.module, examples, axes)
            translated = _translate(program, examples, axes, graph)
            _simplify(translated.model)
        except Exception as error:  # torch.export raises whatever the model's own code raises under tracing
            raise EdgePeftError(
                f"The {graph.name} graph could not be exported to ONNX.",
                next(iter(str(error).splitlines()), type(error).__name__),
                "The merged model is intact. Please report this, with the model's name and method.",
            ) from error
        save(translated.model, path)


def save(model: ir.Model, path: Path) -> None:
    """Write a graph to ``path`` and its weights to ``<path>.data``, each at an address that vector loads like."""
    try:
        ir.save(model, path, external_data=f"{path.name}.data", alignment=64, align_threshold=0)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy's tofile does not say why it stopped writing; the disk is full.
        raise OSError(errno.ENOSPC, str(error)) from error


def _trace(module: nn.Module, examples: tuple[Tensor, ...], axes: list[Axes]) -> ExportedProgram:
    free = tuple(dict.fromkeys(named, Dim.DYNAMIC) for named in axes)
    # The setting torch.onnx.export itself traces with: sizes of 0 and 1 are not special.
    settings: Any = torch.fx.experimental._config  # made into a module of settings when it is imported
    with settings.patch(backed_size_oblivious=True):
        return torch.export.export(module, examples, dynamic_shapes=(free,), strict=False)


def _translate(program: ExportedProgram, examples: tuple[Tensor, ...], axes: list[Axes], graph: Graph) -> ONNXProgram:
    """Translate without the decomposing second trace if possible, else with it."""

    def translate() -> ONNXProgram:
        translated = torch.onnx.export(
            program,
            examples,
            dynamic_shapes=(tuple(axes),),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            optimize=False,
            verbose=False,
        )
        assert translated is not None
        return translated

    if not _tidy(program):
        return translate()
    program.run_decompositions = lambda *args, **kwargs: program
    try:
        return translate()
    except OnnxExporterError:  # an operator that ONNX cannot express as it is
        del program.run_decompositions
        return translate()


def _tidy(program: ExportedProgram) -> bool:
    """Drop or rename the operators of a trace that have no translation; say whether it is free of in-place changes."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _COPIES or (node.target is aten.dropout.default and node.args[2] is False):
            node.replace_all_uses_with(_as_dtype(node.args[0], node))
            graph.erase_node(node)
        elif node.target in _SYNONYMS:
            node.target = _SYNONYMS[node.target]
        elif node.target in _IN_PLACE and _is_unshared(node.args[0]):
            node.target = _IN_PLACE[node.target]
        elif node.target is aten.rsub.Scalar and len(node.args) == 2:
            with graph.inserting_before(node):
                negative = graph.call_function(aten.neg.default, (node.args[0],))
            negative.meta = dict(node.args[0].meta)
            node.target, node.args = aten.add.Scalar, (negative, node.args[1])
    # To torch, attention and dropout are impure for their randomness; in evaluation there is none.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _changes_input(node))
    return not any(map(_changes_input, graph.nodes))


def _changes_input(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _as_dtype(source: Node, node: Node) -> Node:
    """``source``, converted if ``node`` has another dtype."""
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return source
    with node.graph.inserting_before(node):
        converted = node.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
    converted.meta = dict(node.meta)
    return converted


def _is_unshared(node: Node) -> bool:
    """Whether this tensor is read only by the operator that changes it: then the change is as good as a new tensor."""
    schema = _schema(node)
    return len(node.users) == 1 and schema is not None and all(value.alias_info is None for value in schema.returns)


def _schema(node: Node) -> Any:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _simplify(model: ir.Model) -> None:
    """Fold constants, drop duplicates and dead ends, and name what is left after the modules it came from."""
    passes.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, input_size_limit=FOLDED_ELEMENTS)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)
    _name(model)
    passes.NameFixPass()(model)


def _name(model: ir.Model) -> None:
    """Call each node ``<module>/<operator>`` and drop the exporter's notes, which hold paths of this machine."""
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2].removeprefix("model").removeprefix(".") if len(scopes) > 1 else ""
        node.name = f"{module}/{node.op_type}"
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and printed graphs from the user; what fails is raised."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
