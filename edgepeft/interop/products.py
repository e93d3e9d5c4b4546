"""KronA, which PEFT calls LoKr, and GLoRA as PEFT stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.interop.form import Form, Read, Tensors, Written, flat, grouped, padded
from edgepeft.interop.settings import REMEDY, of_layer
from edgepeft.methods.glora import GLoRA
from edgepeft.methods.krona import KronA
from edgepeft.placements.kronecker import split

_A, _B, _INNER = (f"delta.product.{leaf}" for leaf in ("a", "b", "inner"))
_W1, _W2, _W2A, _W2B = "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"
_W1A, _W1B = "lokr_w1_a", "lokr_w1_b"


def _write(method: KronA, tensors: Tensors, made: Backbone) -> Written:
    """PEFT keeps the second factor whole from half its longer side on; what it keeps otherwise is rewritten exactly."""
    layers, _ = grouped(tensors, (_A, _B, _INNER))
    whole = {layer: _product(ends, _B, _B, _INNER) for layer, ends in layers.items()}
    rank = method.rank or max(math.ceil(max(b.shape) / 2) for b in whole.values())
    found = {}
    for layer, ends in layers.items():
        found[layer] = {_W1: ends[_A]}
        if rank >= max(whole[layer].shape) / 2:
            found[layer][_W2] = whole[layer]
        elif _INNER in ends:
            found[layer] |= {_W2A: ends[_B], _W2B: ends[_INNER]}
        else:
            found[layer] |= _factors(whole[layer], rank)
    return Written(flat(found), {"target_modules": sorted(layers), "r": rank, "alpha": method.scale * rank})


def _factors(whole: Tensor, rank: int) -> Tensors:
    """A matrix (rows, columns) as a product of ``rank``, which is at least the smaller of both."""
    one = torch.eye(min(whole.shape))
    left, right = (whole, one) if whole.shape[1] <= whole.shape[0] else (one, whole)
    return {_W2A: padded(left, rank, 1), _W2B: padded(right, rank, 0)}


def _product(ends: Tensors, whole: str, left: str, right: str) -> Tensor:
    return ends[left] @ ends[right] if right in ends else ends[whole]


def _read(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    """One rank and scale for all layers, or else whole factors that the scale is part of."""
    layers, _ = grouped(tensors, _TENSORS)
    scales, ranks, found = {}, {}, {}
    for layer, ends in layers.items():
        own = of_layer(config, "rank_pattern", layer, float(config["r"]))
        scales[layer] = of_layer(config, "alpha_pattern", layer, float(config["alpha"])) / own
        first, second = _product(ends, _W1, _W1A, _W1B), _product(ends, _W2, _W2A, _W2B)
        linear: Any = made.model.get_submodule(layer)
        sizes = [split(linear.out_features), split(linear.in_features)]
        if [tuple(first.shape), tuple(second.shape)] != [tuple(part) for part in zip(*sizes, strict=True)]:
            raise UsageError(
                f"A PEFT adapter with decompose_factor = {config.get('decompose_factor')!r} cannot be read.",
                f"{layer} is split into {tuple(first.shape)} and {tuple(second.shape)}; krona splits sizes as squarely "
                "as they allow.",
                REMEDY,
            )
        ranks[layer] = ends[_W2A].shape[1] if _W2A in ends else 0
        found[layer] = {_A: first, _B: second}
    rank, scale = next(iter(ranks.values())), next(iter(scales.values()))
    if set(ranks.values()) == {rank} and all(rank < min(ends[_B].shape) for ends in found.values()) and rank:
        for layer, ends in layers.items():
            found[layer] |= {_B: ends[_W2A], _INNER: ends[_W2B]}
    else:
        rank = 0
    if set(scales.values()) != {scale}:
        for layer in found:
            found[layer][_B] = found[layer][_B] * (scales[layer] / scale)
    drops = [name for name in ("rank_dropout", "module_dropout") if config.get(name)]
    notes = tuple(f"{name} {config[name]} acts in training only, and krona has none here." for name in drops)
    return Read({"rank": rank, "scale": scale}, flat(found), notes)


_FORMS = {"none": "none", "scalar": "constant", "vector": "vector", "lowrank": "lora"}  # from the least to the most
_OURS = {theirs: ours for ours, theirs in _FORMS.items()}
_SUPPORTS = tuple(f"delta.{name}.{leaf}" for name in "abcde" for leaf in ("down", "up", "value"))
_PATHS = tuple(f"glora_{name}.{leaf}" for name in "ABCDE" for leaf in ("Xd", "Xu", "X", "zeros"))


def _write_general(method: GLoRA, tensors: Tensors, made: Backbone) -> Written:
    """PEFT has one form for A and B and one for D and E: the richer one, which can express the other."""
    layers, _ = grouped(tensors, _SUPPORTS)
    forms = {name: getattr(method, name) for name in "abcde"}
    for pair in (("a", "b"), ("d", "e")):
        richer = max((forms[name] for name in pair), key=list(_FORMS).index)
        forms |= dict.fromkeys(pair, richer)
    forms["c"] = "vector" if forms["c"] == "scalar" else forms["c"]
    found: Tensors = {}
    for layer, ends in layers.items():
        linear: Any = made.model.get_submodule(layer)
        rows, columns = linear.out_features, linear.in_features
        sizes = {"a": (rows, columns), "b": (rows, columns), "c": (columns, 1), "d": (rows, 1), "e": (rows, 1)}
        for name, (height, width) in sizes.items():
            own = {leaf: ends.get(f"delta.{name}.{leaf}") for leaf in ("down", "up", "value")}
            form = forms[name] if name in "ab" or linear.bias is not None else "none"
            for leaf, tensor in _path(form, own, height, width, method.rank).items():
                found[f"{layer}.glora_{name.upper()}.{leaf}"] = tensor.flatten() if name in "de" else tensor
    settings = {
        "target_modules": sorted(layers),
        "r": method.rank,
        "config_A_B": _FORMS[forms["a"]],
        "config_C": _FORMS[forms["c"]],
        "config_D_E": _FORMS[forms["d"]],
    }
    return Written(found, settings)


def _path(form: str, own: Mapping[str, Tensor | None], height: int, width: int, rank: int) -> Tensors:
    """A support of any form, or none, in a form that is at least as rich."""
    down, up, value = own["down"], own["up"], own["value"]
    if form == "none":
        return {"zeros": torch.zeros(height, width)}
    if down is not None and up is not None:
        return {"Xd": down, "Xu": up}
    value = torch.zeros(1, 1) if value is None else value
    if form == "lowrank":
        column = value.expand(height, 1)
        return {"Xd": padded(column, rank, 1), "Xu": padded(torch.ones(1, width), rank, 0)}
    return {"X": value.expand(height, 1).contiguous() if form == "vector" else value.flatten()}


def _read_general(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    layers, _ = grouped(tensors, _PATHS)
    leaves = {"Xd": "down", "Xu": "up", "X": "value"}
    found: Tensors = {}
    for layer, ends in layers.items():
        for end, tensor in ends.items():
            path, _, leaf = end.partition(".")
            if leaf != "zeros":
                name = f"{layer}.delta.{path[-1].lower()}.{leaves[leaf]}"
                found[name] = tensor.reshape(-1, 1) if leaf == "X" else tensor
    pair, move, shift = (_OURS[config[f"config_{names}"]] for names in ("A_B", "C", "D_E"))
    return Read({"rank": config["r"], "a": pair, "b": pair, "c": move, "d": shift, "e": shift}, found)


_DROPS = ("rank_dropout", "module_dropout", "rank_dropout_scale")
_SPLITS = ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor")
_TENSORS = (_W1, _W2, _W1A, _W1B, _W2A, _W2B)
KRONA = Form(("LOKR",), _TENSORS, (*_SPLITS, *_DROPS), _write, _read, neutral=0.0, transposed=False)
GLORA = Form(
    ("GLORA",),
    _PATHS,
    ("r", "config_A_B", "config_C", "config_D_E"),
    _write_general,
    _read_general,
    neutral=0.0,
    transposed=False,
)
