"""One traced module becomes one ONNX file, without the parts of torch's exporter that cost most and change nothing."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Axes = dict[int, str]
aten = torch.ops.aten


@dataclass(frozen=True)
class Graph:
    """A module to translate.

    Attributes:
        name: of the file, without ``.onnx``.
        inputs: an example of each input with the names of its dynamic axes, in the order ``module`` takes them.
        outputs: their names, in the order ``module`` returns them.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Axes]]
    outputs: list[str]

_ASSERTIONS = {aten._assert_scalar.default, aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default, aten._assert_async.msg}
_COPIES = {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default, aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default, aten.alias.default, aten.dropout.default}
_RENAMED = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.min.other: aten.minimum.default, aten.add_.Tensor: aten.add.Tensor}

def clean(program):
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function": continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _COPIES:
            source = node.args[0]
            dtype = node.meta["val"].dtype
            if source.meta["val"].dtype != dtype:
                with graph.inserting_before(node):
                    copy = graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
                copy.meta = dict(node.meta)
                source = copy
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target in _RENAMED:
            node.target = _RENAMED[node.target]
    graph.eliminate_dead_code()


def write(graph: Graph, path: Path) -> None:
    t=[time.process_time()]
    def lap(n):
        t.append(time.process_time()); print(f"   {n} {t[-1]-t[-2]:.2f}", end="")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        args=tuple(v for v,_ in graph.inputs.values())
        D=torch.export.Dim.DYNAMIC
        named=[ax for _,ax in graph.inputs.values()]
        # the modules take *rest for what follows
        import inspect
        k=sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(graph.module.forward).parameters.values())
        def nest(l): return (*l[:k], tuple(l[k:])) if len(l)>k else tuple(l)
        program=torch.export.export(graph.module,args,dynamic_shapes=nest([{a:D for a in ax} for ax in named]),strict=False)
        lap("trace"); n0=len(program.graph.nodes)
        if "CLEAN" in os.environ:
            clean(program)
            program.run_decompositions=lambda table=None: program
        lap(f"clean({n0}->{len(program.graph.nodes)})")
        import pass_; print(dict(pass_.missing(program)))
        import cProfile,pstats; pr=cProfile.Profile(); pr.enable() if "PROF" in os.environ else None
        p=torch.onnx.export(program,args,dynamic_shapes=nest(named),input_names=list(graph.inputs),output_names=graph.outputs,optimize=False,dynamo=True,verbose=False)
        pr.disable(); pstats.Stats(pr).sort_stats("cumtime").print_stats(60) if "PROF" in os.environ else None
        lap(f"onnx({len(list(p.model.graph))})")
        opt(p, lap)
        p.save(path,external_data=True); lap("save"); print(f"  TOTAL {t[-1]-t[0]:.2f}")

def opt(p, lap):
    import onnxscript.optimizer as O, onnx_ir.passes.common as C, onnx_ir as ir
    if "OPT" not in os.environ:
        p.optimize(); lap(f"optimize({len(list(p.model.graph))})"); return
    m=p.model
    def P(x):
        x(m); lap(f"{type(x).__name__[:16]}({len(list(m.graph))})")
    P(C.InlinePass()); 
    O.fold_constants(m); lap(f"fold({len(list(m.graph))})")
    P(C.RemoveUnusedNodesPass())
    P(C.LiftConstantsToInitializersPass(lift_all_constants=True,size_limit=0))
    P(C.DeduplicateInitializersPass()); P(C.CommonSubexpressionEliminationPass())
    P(C.RemoveUnusedNodesPass()); P(C.RemoveUnusedFunctionsPass()); P(C.RemoveUnusedOpsetsPass()); P(C.OutputFixPass()); P(C.NameFixPass())
