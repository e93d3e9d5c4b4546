"""No method: only what a classifier lacks is trained, its head. A method must beat it to have done anything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """A linear classifier on the frozen backbone."""

    paper = Paper("Understanding intermediate layers using linear classifier probes", 2016, "1610.01644")
    kind = "selective"

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        model.requires_grad_(False)
