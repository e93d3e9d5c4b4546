"""Training some output nodes of a linear layer in place of the backbone's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgepeft import precision
from edgepeft.placements import delta


class Nodes(delta.Delta):
    """Rows of W and entries of b that are trained, while the rest of the layer stays frozen.

    The layer's own rows stay beside them: which they are depends on values, and stored ones may replace these.

    Args:
        linear: a layer with plain weights.
        nodes: which outputs are trained, ascending, (nodes,).
        moved: by parameter of the layer, how far the nodes start from the layer's own: of the parameter's shape.
    """

    nodes: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, nodes: Tensor, moved: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("nodes", nodes)
        start = {name: own.detach()[nodes].float() + moved[name][nodes] for name, own in linear.named_parameters()}
        self.weight = nn.Parameter(start["weight"])
        self.bias = nn.Parameter(start["bias"]) if "bias" in start else None

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        trained = precision.linear(x, self.weight)
        if self.bias is not None:
            trained = trained + self.bias.to(trained.dtype)
        return output.index_copy(-1, self.nodes, trained.to(output.dtype))

    def fold(self, linear: nn.Linear) -> None:
        linear.weight.index_copy_(0, self.nodes, self.weight.to(linear.weight.dtype))
        if self.bias is not None:
            linear.bias.index_copy_(0, self.nodes, self.bias.to(linear.bias.dtype))


def most_changed(distances: Tensor, share: float) -> Tensor:
    """The nodes with the largest of ``distances`` (nodes,), ascending; at least one."""
    count = max(1, round(share * len(distances)))
    return torch.topk(distances, count).indices.sort().values
