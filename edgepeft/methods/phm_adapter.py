"""PHM adapters: Houlsby's bottlenecks, with sums of Kronecker products in place of full projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import bottleneck, hypercomplex


@dataclass(frozen=True, kw_only=True)
class PHMAdapter(Method):
    """h → h + up(gelu(down(h))) after both sub-layers; a projection of d × k has d k / n + n³ parameters.

    The adapter that Compacter is measured against in its paper (arXiv 2106.04647), of which placement, activation and
    initialisation are. The learning rate is that of its authors' script, phm_adapters.json of rabeehk/compacter, whose
    ``n`` is 12, which divides fewer models' widths, and which trains the layer norms as well.
    """

    paper = Paper(
        "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications with 1/n "
        "Parameters",
        2021,
        "2102.08597",
    )
    kind = "additive"
    shardable = True
    merges = False
    obstacle = bottleneck.OBSTACLE
    overhead = "two bottlenecks in a layer"
    narrow = {"reduction": 8, "n": 2}
    learning_rate = 3e-3

    reduction: int = 32
    """How many times narrower a bottleneck is than the backbone."""
    n: int = 4
    """Kronecker products in a sum, and rows and columns of the small matrices; divides hidden size and bottleneck."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.n >= 1, "n", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for part in anatomy.sub_layers(("attention", "feed_forward")):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            hypercomplex.check(self.name, self.n, wide, size)
            down = hypercomplex.Hypercomplex(hypercomplex.rule(self.n, device), wide, size)
            up = hypercomplex.Hypercomplex(hypercomplex.rule(self.n, device), size, wide)
            bottleneck.after(model, part, bottleneck.Bottleneck(down, up, F.gelu))
