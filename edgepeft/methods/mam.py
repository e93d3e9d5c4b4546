"""MAM: prefixes before the attentions, scaled parallel adapters beside the feed-forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import attention, bottleneck, prefix
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """Mix-and-match: prefix tuning where a few parameters change attention most, wide adapters beside feed-forwards.

    The prefix is made by a network while training, as in prefix tuning; the adapters are those of ``parallel``.
    Lengths, widths and scale are the paper's for summarisation (XSum), the learning rate is the one for classification.
    """

    paper = Paper("Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, "2110.04366")
    kind = "hybrid"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a prefix before each attention's tokens, a bottleneck beside each feed-forward"
    learning_rate = 1e-4  # as in parallel
    narrow = {"length": 5, "bottleneck": 16}

    length: int = 30
    """Tokens of the prefix; the paper's, of about 6.7 % trained parameters, has 30 too."""
    bottleneck: int = 800
    """Width of the network that makes the prefix while training; 0 trains the prefix itself."""
    reduction: int = 2
    """How many times narrower an adapter is than the backbone."""
    scale: float = 4.0
    """What an adapter's output is multiplied with."""

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.bottleneck >= 0, "bottleneck", "a width, or 0 for no network")
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.scale > 0, "scale", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        prefix.attach(self.name, model, anatomy, attention.sites(model, anatomy), self.length, self.bottleneck)
        for part in anatomy.sub_layers(("feed_forward",)):
            wide = bottleneck.width(model, part)
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.beside(model, part, bottleneck.dense_from_zero(wide, size, F.relu, device, self.scale))

    def stages(self) -> tuple[Stage, ...]:
        done = Stage(name="collapse", optimizer=self.optimizer, begin=prefix.collapse, updates=0)
        return (*super().stages(), done)

    def positions(self, configuration: PretrainedConfig) -> int:
        return prefix.positions(self.length, configuration)
