"""LoRA: a low-rank change of linear layers. On an NF4 backbone it is QLoRA."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft import precision
from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, loftq, selection, targets


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
    """W + (alpha / rank) · B A, with B starting at zero, so that training starts at the backbone.

    With LoftQ, training starts at a packed backbone plus the best low-rank repair of what packing lost. Such an adapter
    belongs to weights that were packed for it; they are packed anew, and equally, whenever it is loaded.
    """

    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685")
    kind = "reparametrised"
    shardable = True
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
    rank_stabilised: bool = False
    """Scale by alpha / √rank instead, with which high ranks learn as fast as low ones (rsLoRA, arXiv 2312.03732)."""
    ratio: float = 1.0
    """Learning rate of B over that of A; above 1 this is LoRA+ (arXiv 2402.12354), which suggests 16."""
    loftq: int = 0
    """Alternations of LoftQ's initialisation (arXiv 2310.08659), which tries 1 to 5; needs a packed precision."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.alpha > 0, "alpha", "above 0")
        self.require(0 <= self.dropout < 1, "dropout", "a probability below 1")
        self.require(self.ratio > 0, "ratio", "above 0")
        self.require(self.loftq >= 0, "loftq", "0 or more")

    def check(self, at: str) -> None:
        super().check(at)
        if self.loftq and not precision.is_packed(at):
            raise UsageError(
                f"{self.name} with loftq cannot train on {at} weights.",
                "LoftQ makes up for what packing loses, and they are not packed.",
                "Use --precision nf4 or int8, or leave the option loftq out.",
            )

    @property
    def packs_its_own(self) -> bool:
        return self.loftq > 0

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = targets.linears(self.name, anatomy, self.targets)
        targets.check_rank(self.name, self.rank, model, names)
        for name in names:
            linear: Any = model.get_submodule(name)
            change = LowRank(linear, self.rank, self.scale, self.dropout)
            if "start" in vars(linear):
                a, b = vars(linear).pop("start")
                with torch.no_grad():
                    change.a[: len(a)] = a  # a layer may be too small for the rank
                    change.b[:, : len(a)] = b / self.scale
            delta.attach(linear, change)

    def pack(self, linear: nn.Linear, at: str, roles: Collection[str]) -> precision.StoredLinear:
        if not self.loftq or not set(roles) & set(self.targets):
            return super().pack(linear, at, roles)
        rank = min(self.rank, linear.in_features, linear.out_features)
        packed, a, b = loftq.alternate(linear, at, rank, self.loftq)
        vars(packed)["start"] = (a, b)  # not registered: it is no part of the backbone, and inject takes it away
        return packed

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        made = super().optimizer(model, lr, weight_decay)
        faster = {id(module.b) for module in model.modules() if isinstance(module, LowRank)}
        if self.ratio == 1:
            return made
        groups = [
            {**group, "params": part, "lr_scale": scale}
            for group in made.param_groups
            for scale, part in (
                (1.0, [p for p in group["params"] if id(p) not in faster]),
                (self.ratio, [p for p in group["params"] if id(p) in faster]),
            )
            if part
        ]
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
