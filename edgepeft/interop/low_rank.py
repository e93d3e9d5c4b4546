"""LoRA, DoRA and AdaLoRA as PEFT stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgepeft.backbone import Backbone
from edgepeft.interop.form import Form, Read, Tensors, Written, flat, grouped, padded
from edgepeft.interop.settings import of_layer
from edgepeft.methods.adalora import AdaLoRA
from edgepeft.methods.dora import DoRA
from edgepeft.methods.lora import LoRA

A, B, MAGNITUDE, E = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_E"
_ADA_A, _ADA_B = "lora_A", "lora_B"


def _write(method: LoRA | DoRA, tensors: Tensors, made: Backbone) -> Written:
    low = "delta.low" if isinstance(method, DoRA) else "delta"
    theirs = {f"{low}.a": A, f"{low}.b": B, "delta.magnitude": MAGNITUDE}
    layers, _ = grouped(tensors, tuple(theirs))
    named = {layer: {theirs[end]: tensor for end, tensor in ends.items()} for layer, ends in layers.items()}
    settings = {
        "target_modules": sorted(layers),
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": isinstance(method, LoRA) and method.rank_stabilised,
    }
    return Written(flat(named), settings)


def _read(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    """Layers of lower ranks get zeros up to the highest, and a scale of their own becomes part of their B."""
    layers, _ = grouped(tensors, (A, B, MAGNITUDE))
    dora, stable = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    low = "delta.low" if dora else "delta"
    rank = max(ends[A].shape[0] for ends in layers.values())
    given = float(config["lora_alpha"])

    def scale(alpha: float, own: int) -> float:
        return alpha / (math.sqrt(own) if stable else own)

    found = {}
    for layer, ends in layers.items():
        own = ends[A].shape[0]
        factor = scale(of_layer(config, "alpha_pattern", layer, given), own) / scale(given, rank)
        found[layer] = {f"{low}.a": padded(ends[A], rank, 0), f"{low}.b": padded(ends[B] * factor, rank, 1)}
        if dora:
            found[layer]["delta.magnitude"] = ends[MAGNITUDE].flatten()
    options: dict[str, Any] = {"rank": rank, "dropout": float(config.get("lora_dropout") or 0.0)}
    if dora:
        options["alpha"] = scale(given, rank) * rank
    else:
        options |= {"alpha": given, "rank_stabilised": stable}
    return Read(options, flat(found))


def _write_adaptive(method: AdaLoRA, tensors: Tensors, made: Backbone) -> Written:
    theirs = {"delta.a": _ADA_A, "delta.b": _ADA_B, "delta.e": E}
    layers, _ = grouped(tensors, tuple(theirs))
    named = {layer: {theirs[end]: tensor for end, tensor in ends.items()} for layer, ends in layers.items()}
    for ends in named.values():
        ends[E] = ends[E][:, None] * _crumb(method.rank)
    settings = {
        "target_modules": sorted(layers),
        "r": method.rank,
        "init_r": method.rank,
        "target_r": method.budget,
        "lora_alpha": method.alpha,
        "total_step": 1,  # of training, which is over; PEFT wants one
    }
    return Written(flat(named), settings)


def _read_adaptive(config: Mapping[str, Any], tensors: Tensors, made: Backbone) -> Read:
    """PEFT cuts the triplets that were taken away, and divides by the rank there was at first all the same."""
    layers, _ = grouped(tensors, (_ADA_A, _ADA_B, E))
    rank, stored = int(config["init_r"]), max(ends[_ADA_A].shape[0] for ends in layers.values())
    if rank < stored:
        raise ValueError(f"init_r is {rank}, and there are layers of rank {stored}")
    found = {
        layer: {
            "delta.a": padded(ends[_ADA_A], rank, 0),
            "delta.b": padded(ends[_ADA_B], rank, 1),
            "delta.e": padded(ends[E].flatten() / _crumb(rank), rank, 0),
        }
        for layer, ends in layers.items()
    }
    options = {"rank": rank, "budget": min(int(config["target_r"]), rank), "alpha": float(config["lora_alpha"])}
    dropped = config.get("lora_dropout")
    notes = (f"lora_dropout {dropped} acts in training only, and adalora has none here.",) if dropped else ()
    return Read(options, flat(found), notes)


def _crumb(rank: int) -> float:
    """PEFT divides by the rank and 1e-5."""
    return (rank + 1e-5) / rank


_RANKS = ("r", "lora_alpha", "lora_dropout", "rank_pattern")
_PATTERNS = (*_RANKS, "alpha_pattern", "use_rslora")
_TRAINING = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
LORA = Form(("LORA",), (A, B), _PATTERNS, _write, _read, neutral=0.0)
DORA = Form(("LORA",), (A, B, MAGNITUDE), (*_PATTERNS, "use_dora"), _write, _read)
ADALORA = Form(
    ("ADALORA",),
    (_ADA_A, _ADA_B, E),
    (*_RANKS, "init_r", "target_r", *_TRAINING),
    _write_adaptive,
    _read_adaptive,
    neutral=0.0,
)
