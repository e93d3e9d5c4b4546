"""LN tuning: only the normalisation layers' scales and shifts are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import selection


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Train the weights and biases of every LayerNorm or RMSNorm; they are then part of the model, at no cost."""

    paper = Paper(
        "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022, "2211.08682"
    )
    kind = "selective"
    shardable = True
    learning_rate = 2e-3

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        if not anatomy.norms:
            raise UsageError(
                "ln_tuning finds nothing to train in this model.",
                "Its normalisations have no weights.",
                "Use --method ia3, which trains as little, or --method lora.",
            )
        names = (f"{norm}.{leaf}" for norm in anatomy.norms for leaf, _ in model.get_submodule(norm).named_parameters())
        selection.train(model, list(names))
