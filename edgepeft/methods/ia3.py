"""(IA)³: keys, values and the hidden features of feed-forwards are scaled, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgepeft.anatomy import Anatomy, Block
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import scale, selection


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """A factor for each feature of keys, values and hidden activations, which all start at 1.

    The hidden activations are what the feed-forward's second linear layer reads, so that every factor merges.
    """

    paper = Paper(
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022, "2205.05638"
    )
    kind = "additive"
    shardable = True
    learning_rate = 3e-3

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        device = next(model.parameters()).device
        for block in anatomy.blocks:
            for prefix in ("", "cross_"):
                for name, count in _keys_and_values(model, block, prefix).items():
                    scale.outputs(model.get_submodule(name), scale.Scale(count, device))
            for name in block.linears["ffn_out"]:
                linear: Any = model.get_submodule(name)
                scale.inputs(linear, scale.Scale(linear.in_features, device))

    def merge(self, model: nn.Module) -> None:
        scale.fold(model)
        selection.fold(model)


def _keys_and_values(model: nn.Module, block: Block, prefix: str) -> dict[str, int]:
    """The layers that give keys or values, and how many features of each, the last ones, those are.

    A fused projection gives queries first, as many as the layer after attention reads.
    """
    found = {}
    for role in (f"{prefix}key", f"{prefix}value"):
        for name in block.linears.get(role, ()):
            linear: Any = model.get_submodule(name)
            after: Any = model.get_submodule(block.linears[f"{prefix}output"][0])
            fused = name in block.linears[f"{prefix}query"]
            found[name] = linear.out_features - (after.in_features if fused else 0)
    return found
