"""Scaled parallel adapters: a bottleneck beside every feed-forward sub-layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck


@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    """h → h + scale · up(relu(down(x))), where x is what the feed-forward reads and h what it gives.

    The bottleneck starts at zero, as LoRA does. Its width and scale are the paper's for summarisation (XSum), the
    learning rate is the one for classification.
    """

    paper = Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, "2110.04366")
    kind = "additive"
    shardable = True
    merges = False
    obstacle = bottleneck.OBSTACLE
    overhead = "a bottleneck beside each feed-forward"
    learning_rate = 1e-4  # the authors' for classification; at 1e-3 a wide bottleneck, scaled, learns nothing on MiniLM

    reduction: int = 2
    """How many times narrower a bottleneck is than the backbone; 2 gives the paper's 512 for a width of 1024."""
    scale: float = 4.0
    """What the bottleneck's output is multiplied with; the paper's choice."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.scale > 0, "scale", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for part in anatomy.sub_layers(("feed_forward",)):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.beside(model, part, bottleneck.dense_from_zero(wide, size, F.relu, device, self.scale))
