"""SPoT: prompt tuning that starts from the prompt of another task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.methods.prompt_tuning import PromptTuning
from edgepeft.placements import prefix, prompt, stored

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class SPoT(Method):
    """A prompt trained on one task, on the same backbone, is where training on the next begins.

    The first run is one of prompt tuning, or of SPoT itself.
    """

    paper = Paper("SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", 2021, "2110.07904")
    kind = "additive"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a longer input"
    narrow = {"length": 5}
    learning_rate = 3e-2

    source: str = ""
    """Folder of the adapter whose prompt is the start."""
    length: int = 100
    """Tokens of the prompt."""

    def __post_init__(self) -> None:
        self.require(self.length >= 1, "length", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        if not self.source:
            raise UsageError(
                f"{self.name} needs a prompt to start from.",
                "Its option source names no adapter.",
                "Train one on another task with --method prompt_tuning, then give --set options.source=RUN/adapter.",
            )
        made = prompt.Prompt(stored.prompt(self.name, self.source, model, self.length))
        prompt.attach(self.name, model, anatomy, made, self.length)

    def finished(self) -> Method:
        return PromptTuning(length=self.length)

    def positions(self, configuration: PretrainedConfig) -> int:
        return self.length

    def condense(self, model: nn.Module) -> None:
        prompt.condense(model)
