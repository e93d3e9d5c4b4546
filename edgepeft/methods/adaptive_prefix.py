"""Adaptive prefix tuning: a prefix whose tokens each layer weighs anew for every token that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import attention, prefix
from edgepeft.placements.gate import Gate
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class AdaptivePrefix(Method):
    """Prefix tuning with a gate for every prefix token, sigmoid(W x), and a scale of the whole prefix in every layer.

    Not in the paper, which multiplies keys and values by one gate for the whole sequence: here each token has gates of
    its own, which multiply the weights it gives the prefix. So a decoder sees no later token through them.
    """

    paper = Paper(
        "Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model Fine-tuning", 2023, "2305.15212"
    )
    kind = "additive"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a gated prefix before each attention's tokens"
    narrow = {"length": 5, "bottleneck": 16}

    length: int = 30
    """Tokens of the prefix."""
    bottleneck: int = 512
    """Width of the network that makes the prefix while training; 0 trains the prefix itself."""

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.bottleneck >= 0, "bottleneck", "a width, or 0 for no network")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        where = attention.sites(model, anatomy)
        prefix.attach(self.name, model, anatomy, where, self.length, self.bottleneck)
        for site in where:
            module = model.get_submodule(site.path)
            prefix.scale(module)
            prefix.weigh(module, Gate(site.hidden, self.length, device))

    def stages(self) -> tuple[Stage, ...]:
        done = Stage(name="collapse", optimizer=self.optimizer, begin=prefix.collapse, updates=0)
        return (*super().stages(), done)

    def positions(self, configuration: PretrainedConfig) -> int:
        return prefix.positions(self.length, configuration)
