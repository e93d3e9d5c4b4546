"""Full fine-tuning: every parameter is trained, in the precision it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import rounding


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train everything: the yardstick of the survey, and the most memory."""

    paper = Paper("Universal Language Model Fine-tuning for Text Classification", 2018, "1801.06146")
    kind = "selective"
    shardable = True
    saves = ()
    writes_backbone = True
    learning_rate = 5e-5

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        model.requires_grad_(True)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        made = super().optimizer(model, lr, weight_decay)
        if all(parameter.dtype is torch.float32 for group in made.param_groups for parameter in group["params"]):
            return made
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in made.param_groups]
        return rounding.AdamW(groups, lr=lr)
