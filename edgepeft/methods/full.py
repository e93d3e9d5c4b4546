"""Full fine-tuning: every parameter is trained, in the precision it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train everything: the yardstick of the survey, and the most memory."""

    paper = Paper("Universal Language Model Fine-tuning for Text Classification", 2018, "1801.06146")
    kind = "selective"
    saves = ()
    writes_backbone = True
    learning_rate = 5e-5

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        model.requires_grad_(True)
