"""LoRA: a low-rank change of linear layers. On an NF4 backbone it is QLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import precision
from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError, nearest
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, selection


class LowRank(delta.Additive):
    """x → scale · x Aᵀ Bᵀ with A (rank, in) and B (out, rank), kept in fp32."""

    def __init__(self, linear: nn.Linear | precision.StoredLinear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        device = next(iter([*linear.parameters(), *linear.buffers()])).device
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = scale
        self.dropout = dropout

    def change(self, x: Tensor) -> Tensor:
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return precision.linear(precision.linear(x, self.a) * self.scale, self.b)

    def weight(self) -> Tensor:
        return self.scale * (self.b.detach() @ self.a.detach())


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """W + (alpha / rank) · B A, with B starting at zero, so that training starts at the backbone."""

    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685")
    kind = "reparametrised"
    aliases = {"qlora": "nf4"}
    learning_rate = 5e-4

    rank: int = 8
    """Rank of the change."""
    alpha: float = 16.0
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an input feature of the change is dropped in training."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed; all of them is what QLoRA found best (arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(0 <= self.dropout < 1, "dropout", "a probability below 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        for role in self.targets:
            if role not in ROLES:
                raise UsageError(f"lora: there is no target {role!r}.", "", nearest(role, ROLES))
        names = anatomy.linears(self.targets)
        if not names:
            raise UsageError(
                "lora: its targets match no layer of this model.",
                f"The model has none with the roles {', '.join(self.targets)}.",
                f"It has {', '.join(sorted({role for block in anatomy.blocks for role in block.linears}))}.",
            )
        for name in names:
            linear: Any = model.get_submodule(name)
            delta.attach(linear, LowRank(linear, self.rank, self.alpha / self.rank, self.dropout))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
