"""UniPELT: LoRA, prefixes and adapters at once, each with gates that learn when to use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, NotMergeable, Paper
from edgepeft.methods.lora import LowRank
from edgepeft.placements import attention, bottleneck, delta, prefix, targets
from edgepeft.placements.gate import Gate
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROLES = ("query", "value", "cross_query", "cross_value")


class _GatedLowRank(delta.Delta):
    """y + gate(x) · x Aᵀ Bᵀ."""

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        self.change = LowRank(linear, rank, 1.0, 0.0)
        self.gate = Gate(linear.in_features, 1, self.change.a.device)

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        return output + self.gate(x) * self.change.change(x)

    def fold(self, linear: nn.Linear) -> None:
        raise NotMergeable("A gated change cannot be folded.", "Its size depends on what the layer reads.", "")


class _GatedAdapter(nn.Module):
    """h → gate(h) · adapter(h)."""

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.adapter = bottleneck.dense(width, size, F.relu, device)
        self.gate = Gate(width, 1, device)

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = self.gate(hidden) * self.adapter(hidden)
        return gated


@dataclass(frozen=True, kw_only=True)
class UniPELT(Method):
    """LoRA on queries and values, a prefix before every attention, an adapter at the end of every layer, all gated.

    Not in the paper, which averages a gate over the sequence: here every token has gates of its own, so that a decoder
    sees no later token through them; the prefix's multiply the weights that the token gives to it, so that a closed
    gate takes the prefix out of the attention, where the authors' leaves keys of zeros. Where one layer makes queries,
    keys and values (GPT-2), the low-rank change is of all three.
    """

    paper = Paper("UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", 2021, "2110.07577")
    kind = "hybrid"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a gated prefix, gated low-rank changes and a gated bottleneck in each layer"
    narrow = {"length": 5, "bottleneck": 16, "reduction": 4}
    learning_rate = 5e-4

    rank: int = 8
    """Rank of the changes of queries and values."""
    length: int = 10
    """Tokens of the prefix."""
    bottleneck: int = 512
    """Width of the network that makes the prefix while training; 0 trains the prefix itself."""
    reduction: int = 16
    """How many times narrower an adapter is than the backbone."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.bottleneck >= 0, "bottleneck", "a width, or 0 for no network")
        self.require(self.reduction >= 1, "reduction", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        targets.check_rank(self.name, self.rank, model, anatomy.linears(ROLES))
        for name in anatomy.linears(ROLES):
            linear = model.get_submodule(name)
            delta.attach(linear, _GatedLowRank(linear, self.rank))
        where = attention.sites(model, anatomy)
        prefix.attach(self.name, model, anatomy, where, self.length, self.bottleneck)
        for site in where:
            prefix.weigh(model.get_submodule(site.path), Gate(site.hidden, 1, device))
        for block in anatomy.blocks:
            wide = bottleneck.width(model, block.sub_layers["feed_forward"])
            size = bottleneck.size(self.name, wide, self.reduction)
            bottleneck.after_layer(model, block, _GatedAdapter(wide, size, device))

    def stages(self) -> tuple[Stage, ...]:
        done = Stage(name="collapse", optimizer=self.optimizer, begin=prefix.collapse, updates=0)
        return (*super().stages(), done)

    def positions(self, configuration: PretrainedConfig) -> int:
        return prefix.positions(self.length, configuration)
