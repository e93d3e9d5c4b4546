"""Cross-attention tuning: of an encoder-decoder only the attention from one to the other is trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgepeft.anatomy import CROSS_ATTENTION, Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import selection


@dataclass(frozen=True, kw_only=True)
class CrossAttentionTuning(Method):
    """Train the decoder's projections of queries, and those of the encoder's states to keys and values, and back."""

    paper = Paper(
        "Cross-Attention is All You Need: Adapting Pretrained Transformers for Machine Translation", 2021, "2104.08771"
    )
    kind = "selective"
    shardable = True
    writes_backbone = True
    learning_rate = 5e-4

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        linears = anatomy.linears(CROSS_ATTENTION)
        if not linears:
            raise UsageError(
                "cross_attention finds no cross-attention in this model.",
                "Only the decoder of an encoder-decoder such as T5 attends to another stack.",
                'To adapt self-attention: --method lora --set \'options.targets=["query", "key", "value", "output"]\'.',
            )
        selection.train(
            model, [f"{name}.{leaf}" for name in linears for leaf, _ in model.get_submodule(name).named_parameters()]
        )
