"""Houlsby adapters: a bottleneck after every attention and feed-forward sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """h → h + up(gelu(down(h))), where h is what self-attention or the feed-forward adds to the residual stream.

    The projections start near zero (section 3.6), so that training starts close to the backbone, not at it. The paper
    also trains the layer norms; libraries and the survey do not, and neither is it done here: their counts are these.
    """

    paper = Paper("Parameter-Efficient Transfer Learning for NLP", 2019, "1902.00751")
    kind = "additive"
    shardable = True
    merges = False
    obstacle = bottleneck.OBSTACLE
    identity_at_start = False
    overhead = "two bottlenecks in a layer"

    reduction: int = 16
    """How many times narrower a bottleneck is than the backbone; 16 is the AdapterHub library's."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for part in anatomy.sub_layers(("attention", "feed_forward")):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.after(model, part, bottleneck.dense(wide, size, F.gelu, device))
