"""Top-layer tuning: the last layers are trained, and backpropagation ends below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import DEPTHS, Method, Paper
from edgepeft.placements import selection


@dataclass(frozen=True, kw_only=True)
class TopLayers(Method):
    """Train the last layers of the last stack; the layers below keep no activations."""

    paper = Paper("What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019, "1911.03090")
    kind = "selective"
    shardable = True
    writes_backbone = True
    learning_rate = 5e-5
    narrow = {"layers": 1}
    counts_layers = True

    layers: int = 3
    """How many; a quarter of BERT-base's twelve comes within 10 % of tuning all, says the paper."""

    def __post_init__(self) -> None:
        self.require(self.layers >= 1, "layers", "at least 1")

    def depths(self) -> tuple[int, int]:
        deepest = self.layers + self.layers % 2
        return max(DEPTHS[0], deepest), max(DEPTHS[1], deepest + 2)

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        blocks = [block for block in anatomy.blocks if block.stack == len(anatomy.stacks) - 1]
        if self.layers > len(blocks):
            raise UsageError(
                f"top_layers cannot train {self.layers} layers of this model.",
                f"Its last stack has {len(blocks)}.",
                f"Use --set options.layers={max(1, len(blocks) // 4)}, or --method full.",
            )
        tops: Any = [f"{block.path}." for block in blocks[-self.layers :]]
        selection.train(model, [name for name, _ in model.named_parameters() if name.startswith(tuple(tops))])
