"""BitFit: only the biases are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import selection


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases of linear layers and norms; they are then part of the model, at no cost.

    That of a BERT's pooler, which the authors train too, stays as it is.
    """

    paper = Paper(
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        2021,
        "2106.10199",
    )
    kind = "selective"
    shardable = True
    learning_rate = 1e-3

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = selection.biases(model, anatomy)
        if not names:
            raise UsageError(
                "bitfit finds no biases in this model.",
                "Its linear layers and norms add none, as in Llama, or in T5, whose attention bias is an embedding.",
                f"Use --method {'ln_tuning' if anatomy.norms else 'ia3'}, which trains as little, or --method lora.",
            )
        selection.train(model, names)
