"""(IA)³ and LN tuning as PEFT stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgepeft.anatomy import Block
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.interop.form import Form, Read, Tensors, Written, flat, grouped
from edgepeft.interop.settings import REMEDY
from edgepeft.methods.ia3 import IA3
from edgepeft.methods.ln_tuning import LNTuning

_FACTORS = "ia3_l"
_OUT, _IN = "output_scale.factors", "input_scale.factors"
_NORM = "ln_tuning_layers"


def _write(method: IA3, tensors: Tensors, made: Backbone) -> Written:
    """Of a fused projection PEFT scales the queries too: by 1."""
    layers, _ = grouped(tensors, (_OUT, _IN))
    found: Tensors = {}
    for layer, ends in layers.items():
        linear: Any = made.model.get_submodule(layer)
        if _OUT in ends:
            own = ends[_OUT]
            found[f"{layer}.{_FACTORS}"] = torch.cat([own.new_ones(linear.out_features - len(own)), own])[:, None]
        else:
            found[f"{layer}.{_FACTORS}"] = ends[_IN][None]
    inward = sorted(layer for layer, ends in layers.items() if _IN in ends)
    return Written(found, {"target_modules": sorted(layers), "feedforward_modules": inward})


def _read(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    layers, _ = grouped(tensors, (_FACTORS,))
    factors = {layer: ends[_FACTORS] for layer, ends in layers.items()}
    found: Tensors = {}
    for block in made.anatomy.blocks:
        for layer in block.linears["ffn_out"]:
            if layer in factors and len(factors[layer]) == 1:
                found[f"{layer}.{_IN}"] = factors.pop(layer).flatten()
        for cross in ("", "cross_"):
            if f"{cross}query" in block.linears:
                _attention(factors, found, block, cross, made)
    if factors:
        raise UsageError(
            "This PEFT adapter scales what edgepeft's ia3 does not.",
            f"{sorted(factors)[0]} is one of {len(factors)} such layers; ia3 scales keys, values and what the second "
            "layer of a feed-forward reads.",
            REMEDY,
        )
    return Read({}, found)


def _attention(factors: Tensors, found: Tensors, block: Block, cross: str, made: Backbone) -> None:
    """Move an attention's factors from ``factors`` to ``found``.

    Scaling what the output layer reads, as PEFT does in BERT, is scaling values where each has one query head.
    """
    (query,), (value,), (output,) = (block.linears[f"{cross}{role}"] for role in ("query", "value", "output"))
    after: Any = made.model.get_submodule(output)
    linear: Any = made.model.get_submodule(value)
    queries = after.in_features if value == query else 0
    if output in factors and len(factors[output]) == 1 and linear.out_features in (after.in_features, 3 * queries):
        read = factors.pop(output).flatten()
        own = factors.get(value, read.new_ones(linear.out_features, 1)).flatten()
        factors[value] = torch.cat([own[: len(own) - len(read)], own[len(own) - len(read) :] * read])[:, None]
    for layer in dict.fromkeys((*block.linears[f"{cross}key"], value)):
        if layer in factors and factors[layer].shape[1] == 1 and bool((factors[layer][:queries] == 1).all()):
            found[f"{layer}.{_OUT}"] = factors.pop(layer).flatten()[queries:]


def _write_norms(method: LNTuning, tensors: Tensors, made: Backbone) -> Written:
    layers, _ = grouped(tensors, ("weight", "bias"))
    named: dict[str, dict[str, Tensor]] = {
        layer: {f"{_NORM}.{end}": tensor for end, tensor in ends.items()} for layer, ends in layers.items()
    }
    return Written(flat(named), {"target_modules": sorted(layers)})


def _read_norms(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    return Read({}, {name.replace(f".{_NORM}.", "."): tensor for name, tensor in tensors.items()})


IA3_FORM = Form(("IA3",), (_FACTORS,), (), _write, _read, neutral=1.0)
LN_TUNING = Form(("LN_TUNING",), (f"{_NORM}.weight", f"{_NORM}.bias"), (), _write_norms, _read_norms)
