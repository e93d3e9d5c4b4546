"""The parameters of a model with a method in it, as FSDP2 puts them together: counted on shallow models."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from edgepeft.backbone import Backbone, skeleton
from edgepeft.catalog.fields import at_depth, depth
from edgepeft.extrapolate import traced_depths
from edgepeft.methods import base
from edgepeft.sharding import Shape, Unit
from edgepeft.surface import Configuration

Counts = Mapping[tuple[Any, ...], float]


def of(configuration: Configuration) -> tuple[Unit, ...]:
    """The parameters outside of layers, then each kind of layer; precision, model and method decide.

    What a shallow and a deeper model have is carried on to the whole depth. Where a parameter itself depends on how
    many layers there are, it is there a negative number of times in one shape and more often in another, and kinds of
    layers of which there is a share may be there a broken number of times: the sums are right.

    Raises:
        UsageError: the method does not fit the model.
    """
    full = depth(configuration.model)
    depths = traced_depths(configuration.model, base.create(configuration.method, configuration.options))
    low, high = depths[0], depths[-1]
    (root, layers), (deeper_root, deeper_layers) = (_counted(configuration, each) for each in (low, high))
    place = (full - low) / (high - low) if high > low else 0.0
    kinds = _whole(layers, deeper_layers, place)
    return (
        Unit(1, _shapes(_whole(root, deeper_root, place))),
        *(Unit(count, _shapes(dict(kind))) for kind, count in kinds.items()),
    )


def _counted(configuration: Configuration, layers: int) -> tuple[Counts, Counts]:
    """How often there is each shape outside of layers, and how often each kind of layer: what shapes it has, sorted."""
    backbone, own = _built(configuration, layers)
    paths = [f"{block.path}." for block in backbone.anatomy.blocks]
    units: dict[str, Counter[tuple[Any, ...]]] = {path: Counter() for path in ["", *paths]}
    for name, parameter in backbone.model.named_parameters():
        rows = len(parameter) if parameter.dim() else 0
        shape = (name in own, parameter.requires_grad, rows, parameter.nbytes // max(1, rows))
        units[next((path for path in paths if name.startswith(path)), "")][shape] += 1
    return units[""], Counter(tuple(sorted(units[path].items())) for path in paths)


def _whole(low: Counts, high: Counts, place: float) -> Counts:
    """Counts at a depth beyond ``low`` by ``place`` times what ``high`` has more."""
    found = {key: low.get(key, 0) * (1 - place) + high.get(key, 0) * place for key in {**low, **high}}
    return {key: round(count, 9) for key, count in found.items() if count}


def _shapes(counts: Counts) -> tuple[Shape, ...]:
    return tuple(
        Shape(own, trained, rows, row_bytes, count) for (own, trained, rows, row_bytes), count in sorted(counts.items())
    )


def _built(configuration: Configuration, layers: int) -> tuple[Backbone, set[str]]:
    """A model with the method in it, and the names of the parameters that are the backbone's own."""
    fields: dict[str, Any] = copy.deepcopy(at_depth(configuration.model, layers))
    method = base.create(configuration.method, configuration.options)
    with torch.device("meta"):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        backbone = skeleton(
            config, task=configuration.task, at=configuration.precision, labels=configuration.labels, pack=method.pack
        )
        own = {name for name, _ in backbone.model.named_parameters()}
        base.apply(method, backbone)
    return backbone, own
