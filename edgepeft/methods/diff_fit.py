"""DiffFit: biases, norms and embeddings are trained, and a scale on everything that is added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy, embeddings
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, selection

LAST = {"attention": "output", "cross_attention": "cross_output", "feed_forward": "ffn_out"}  # linear of a sub-layer


@dataclass(frozen=True, kw_only=True)
class DiffFit(Method):
    """Each sub-layer's output is scaled, one factor a feature, starting at 1; factors fold into its last linear layer.

    Where a norm stands between that layer and the residual stream (Gemma 2), the norm's own weight is that factor.
    """

    paper = Paper(
        "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning",
        2023,
        "2304.06648",
    )
    kind = "selective"
    shardable = True
    learning_rate = 1e-3

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        whole = (*anatomy.norms, *embeddings(model))
        names = [n for n, _ in model.named_parameters() if any(n.startswith(f"{module}.") for module in whole)]
        for block in anatomy.blocks:
            for kind, sub_layer in block.sub_layers.items():
                if sub_layer.output not in block.norms:
                    (name,) = block.linears[LAST[kind]]
                    delta.attach(model.get_submodule(name), _Scale(model.get_submodule(name)))
        selection.train(model, dict.fromkeys([*selection.biases(model, anatomy), *names]))

    def merge(self, model: nn.Module) -> None:
        selection.fold(model)
        delta.fold(model)


class _Scale(delta.Delta):
    """y → γ ∘ y with γ (out,) in fp32."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        some = next(iter([*linear.parameters(), *linear.buffers()]))
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=some.device))

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        return (output * self.scale).to(output.dtype)  # rounded to bf16, a factor would be 1 up to 1.004

    def fold(self, linear: nn.Linear) -> None:
        linear.weight.mul_(self.scale.to(linear.weight.dtype)[:, None])
        if linear.bias is not None:
            linear.bias.mul_(self.scale.to(linear.bias.dtype))
