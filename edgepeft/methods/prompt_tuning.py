"""Prompt tuning: trained embeddings before the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import prefix, prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trained embeddings stand before those of the input; an encoder-decoder reads them with its encoder.

    They start as the embeddings of random tokens out of the first 5000, which are the common ones where a vocabulary is
    sorted, as T5's is; a BERT's begins with unused tokens and single characters. A decoder reads the prompt once for a
    whole batch, and a sliding window does not hide it.
    """

    paper = Paper("The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, "2104.08691")
    kind = "additive"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a longer input"
    narrow = {"length": 5}
    learning_rate = 3e-2  # with AdamW; the paper has 0.3 with Adafactor

    length: int = 100
    """Tokens of the prompt; the paper's default, and more than 20 gained little."""

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        made = prompt.Prompt(prompt.from_vocabulary(model, self.length))
        prompt.attach(self.name, model, anatomy, made, self.length)

    def positions(self, configuration: PretrainedConfig) -> int:
        return self.length

    def condense(self, model: nn.Module) -> None:
        prompt.condense(model)
