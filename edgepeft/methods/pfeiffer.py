"""Pfeiffer adapters: one bottleneck at the end of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """y → y + up(relu(down(y))), where y is a layer's output; half of Houlsby's parameters.

    Where a norm ends the layer, the bottleneck reads what leaves the norm and adds to what enters it, which is
    normalised again: the configuration that the paper's search over placements found best.
    """

    paper = Paper("AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, "2005.00247")
    kind = "additive"
    shardable = True
    merges = False
    obstacle = bottleneck.OBSTACLE
    identity_at_start = False
    overhead = "a bottleneck in a layer"

    reduction: int = 16
    """How many times narrower a bottleneck is than the backbone; 16 is the paper's."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for block in anatomy.blocks:
            wide = bottleneck.width(model, block.sub_layers["feed_forward"])
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.after_layer(model, block, bottleneck.dense(wide, size, F.relu, device))
