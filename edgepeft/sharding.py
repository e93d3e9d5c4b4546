"""What one of several devices holds that share a model fully (FSDP2), from the surface of a single one.

Under DDP there is nothing to work out: each device holds what one alone does, as gradients are added up where they are
(``ranks.Ranks.sum``). What NCCL keeps for sending is in neither.

FSDP2 (``torch.distributed.fsdp.fully_shard``, PyTorch 2.13) is taken to wrap every layer and the root, as accelerate's
transformer policy does, to reshard after forward, and to reduce the gradients of every microbatch. Each parameter is
cut along its first dimension into equal shares; the last ones are padded. Gradients and optimizer states are cut alike.
Packed weights (int8, NF4) are buffers, which it does not cut: every device holds all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from edgepeft.backbone import Backbone, skeleton
from edgepeft.catalog.fields import at_depth, depth
from edgepeft.methods import base
from edgepeft.roofline import Work
from edgepeft.surface import KINDS, Configuration, Moment, Surface


@dataclass(frozen=True)
class Inventory:
    """Bytes of the parameters of a model: of all, and of one device's share, padding included.

    Attributes:
        weights, adapter, trained: (all, share) of the backbone's own, of what the method added, of what is trained.
        root, layer: of the parameters outside of layers, and of the largest layer, put together again from the shares;
            ``root_trained`` and ``layer_trained``: of those among them that are trained.
        divisible: whether FSDP2 takes every parameter; it refuses scalars.
    """

    weights: tuple[int, int]
    adapter: tuple[int, int]
    trained: tuple[int, int]
    root: int
    layer: int
    root_trained: int
    layer_trained: int
    divisible: bool

    @property
    def share(self) -> float:
        """Of gradients and optimizer states, what one device holds."""
        return self.trained[1] / max(1, self.trained[0])


def of(configuration: Configuration, devices: int) -> Inventory:
    """The inventory of a configuration, from two shallow models."""
    full = depth(configuration.model)
    low, high = base.create(configuration.method, configuration.options).depths()
    depths = (low, high) if full > high and full % 2 == 0 else (full, full)
    found = [inventory(_built(configuration, layers), devices) for layers in depths]
    one, other = found
    place = (full - low) / (high - low) if depths[0] != depths[1] else 0.0

    def whole(name: str) -> tuple[int, int]:
        a, b = getattr(one, name), getattr(other, name)
        return round(a[0] + place * (b[0] - a[0])), round(a[1] + place * (b[1] - a[1]))

    return replace(other, weights=whole("weights"), adapter=whole("adapter"), trained=whole("trained"))


def inventory(made: tuple[Backbone, set[str]], devices: int) -> Inventory:
    """The inventory of a model that a method is applied to, with the names of the backbone's own parameters."""
    backbone, own = made
    named = dict(backbone.model.named_parameters())
    layers = [f"{block.path}." for block in backbone.anatomy.blocks]
    units: dict[str, list[Tensor]] = {layer: [] for layer in ["", *layers]}
    for name, parameter in named.items():
        units[next((layer for layer in layers if name.startswith(layer)), "")].append(parameter)

    def both(tensors: Iterable[Tensor]) -> tuple[int, int]:
        kept = list(tensors)
        return sum(tensor.nbytes for tensor in kept), sum(share_bytes(tensor, devices) for tensor in kept)

    def gathered(tensors: Iterable[Tensor]) -> int:
        return devices * sum(share_bytes(tensor, devices) for tensor in tensors)

    largest = max((units[layer] for layer in layers), key=gathered)
    return Inventory(
        weights=both(p for n, p in named.items() if n in own),
        adapter=both(p for n, p in named.items() if n not in own),
        trained=both(p for p in named.values() if p.requires_grad),
        root=gathered(units[""]),
        layer=gathered(largest),
        root_trained=gathered(p for p in units[""] if p.requires_grad),
        layer_trained=gathered(p for p in largest if p.requires_grad),
        divisible=all(parameter.dim() for parameter in named.values()),
    )


def share_bytes(parameter: Tensor, devices: int) -> int:
    """What the first of several devices holds of a parameter that is cut along its first dimension."""
    rows = len(parameter) if parameter.dim() else 1
    return -(-rows // devices) * (parameter.nbytes // max(1, rows))


def sharded(surface: Surface, found: Inventory) -> Surface:
    """The surface of one device of several under FSDP2."""
    phases = {
        phase: tuple(_cut(moment, found, phase.rpartition(": ")[2]) for moment in moments)
        for phase, moments in surface.phases.items()
    }
    work = dict(surface.work)
    if "update" in work:
        none, one = work["update"]
        work["update"] = (_scaled(none, found.share), _scaled(one, found.share))
    return replace(surface, phases=phases, work=work)


def _cut(moment: Moment, found: Inventory, phase: str) -> Moment:
    share = {"gradients": found.share, "optimizer": found.share}
    if phase in ("update", "checkpoint"):
        share["temporaries"] = found.share  # of the optimizer: as large as what it updates
    scales = [share.get(kind, 1.0) for kind in KINDS]
    moment = replace(
        moment,
        fixed=tuple(size * scale for size, scale in zip(moment.fixed, scales, strict=True)),
        each=tuple(size * scale for size, scale in zip(moment.each, scales, strict=True)),
    )
    for kind, (whole, own) in (("weights", found.weights), ("adapter", found.adapter)):
        moment = _more(moment, kind, own - whole)
    return _more(moment, "temporaries", _gathered(found, phase))


def _gathered(found: Inventory, phase: str) -> int:
    """What is put together at the peak of a phase, at most.

    The root is until backward ends (it is not resharded after forward); so is the layer at work, and the next one is
    being gathered into a buffer. Backward makes the whole gradients of a layer while those of the layer before it are
    still in the buffer that they are reduced from; those of the root wait until the end.
    """
    if phase == "loading":
        return max(found.root, found.layer)
    if phase not in ("forward+backward", "evaluation"):
        return 0
    gradients = found.root_trained + 2 * found.layer_trained if phase == "forward+backward" else 0
    return found.root + 2 * found.layer + gradients


def _more(moment: Moment, kind: str, size: int) -> Moment:
    place = KINDS.index(kind)
    return replace(moment, fixed=tuple(each + size * (i == place) for i, each in enumerate(moment.fixed)))


def _scaled(work: Mapping[str, Work], share: float) -> dict[str, Work]:
    return {kind: Work(each.calls, round(each.flops * share), round(each.bytes * share)) for kind, each in work.items()}


def _built(configuration: Configuration, layers: int) -> tuple[Backbone, set[str]]:
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
