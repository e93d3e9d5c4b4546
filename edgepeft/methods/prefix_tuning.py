"""Prefix tuning: trained keys and values before those of every attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import attention, prefix
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Every attention, cross-attention too, first reads keys and values that are trained.

    A network makes them while training; the adapter holds only what it makes. As in AdapterHub there is one network
    for each of an encoder's attentions, a decoder's and its cross-attentions.
    """

    paper = Paper("Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, "2101.00190")
    kind = "additive"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a prefix before each attention's tokens"
    narrow = {"length": 5, "bottleneck": 16}

    length: int = 30
    """Tokens of the prefix."""
    bottleneck: int = 512
    """Width of the network that makes the prefix while training; 0 trains the prefix itself."""

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.bottleneck >= 0, "bottleneck", "a width, or 0 for no network")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        prefix.attach(self.name, model, anatomy, attention.sites(model, anatomy), self.length, self.bottleneck)

    def stages(self) -> tuple[Stage, ...]:
        done = Stage(name="collapse", optimizer=self.optimizer, begin=prefix.collapse, updates=0)
        return (*super().stages(), done)

    def positions(self, configuration: PretrainedConfig) -> int:
        return prefix.positions(self.length, configuration)
