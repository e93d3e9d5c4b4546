"""Intrinsic prompt tuning: a few numbers, from which a network trained on the prompts of other tasks makes a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.methods.prompt_tuning import PromptTuning
from edgepeft.placements import prefix, prompt, stored
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _Autoencoder(nn.Module):
    """Prompts (tasks, length · hidden) → codes (tasks, dimension) → prompts.

    Called, it gives the prompt (length, hidden) that it makes of the mean of all codes. No gradient goes through that:
    by it the network would learn this run's task, and forget the prompts.
    """

    prompts: Tensor

    def __init__(self, prompts: Tensor, dimension: int) -> None:
        super().__init__()
        tasks, self.length, self.hidden = prompts.shape
        device, wide = prompts.device, self.length * self.hidden
        self.register_buffer("prompts", prompts.reshape(tasks, wide), persistent=False)
        self.encode = nn.Linear(wide, dimension, device=device)
        self.inner = nn.Linear(dimension, self.hidden, device=device)
        self.outer = nn.Linear(self.hidden, wide, device=device)

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.decode(self.encode(self.prompts).mean(0)).view(self.length, self.hidden)

    def decode(self, codes: Tensor) -> Tensor:
        made: Tensor = self.outer(torch.tanh(self.inner(codes)))
        return made

    def loss(self) -> Tensor:
        """Mean squared difference between the prompts and what is made of them."""
        return (self.decode(self.encode(self.prompts)) - self.prompts).square().mean()


class _Code(nn.Module):
    """A trained code and the frozen half of an autoencoder that makes a prompt (length, hidden) of it."""

    def __init__(self, learned: _Autoencoder) -> None:
        super().__init__()
        self.length, self.hidden = learned.length, learned.hidden
        self.code = nn.Parameter(learned.encode(learned.prompts).mean(0))
        for name in ("inner", "outer"):
            layer: Any = getattr(learned, name)
            self.register_buffer(f"{name}_weight", layer.weight.detach().clone())
            self.register_buffer(f"{name}_bias", layer.bias.detach().clone())

    def forward(self) -> Tensor:
        inner = torch.tanh(F.linear(self.code, self.get_buffer("inner_weight"), self.get_buffer("inner_bias")))
        outer = F.linear(inner, self.get_buffer("outer_weight"), self.get_buffer("outer_bias"))
        return outer.view(self.length, self.hidden)


@dataclass(frozen=True, kw_only=True)
class IPT(Method):
    """Prompts of several tasks lie near a space of few dimensions; it is found first, and then only searched.

    First an autoencoder learns to give back the given prompts, trained on other tasks on the same backbone. Then only a
    code is trained, from the mean of the prompts' codes on. The adapter holds the prompt that it stands for.

    In the paper the autoencoder is also trained on each prompt's own task, by a 200th of the weight. The data of those
    tasks is not here. The head of a classifier learns this run's task in the first stage too.
    """

    paper = Paper("Exploring Universal Intrinsic Task Subspace via Prompt Tuning", 2021, "2110.07867")
    kind = "additive"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "a longer input"
    narrow = {"length": 5, "dimension": 128, "subspace_updates": 40}
    learning_rate = 1e-3

    prompts: tuple[str, ...] = ()
    """Folders of adapters, each with the prompt of one task; at least two."""
    dimension: int = 250
    """Numbers in a code; with 250 the paper regains most of what whole prompts reach."""
    length: int = 100
    """Tokens of the prompts."""
    subspace_updates: int = 300
    """Updates in which the autoencoder learns the prompts, on top of the run's."""

    def __post_init__(self) -> None:
        self.require(self.dimension >= 1, "dimension", "at least 1")
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.subspace_updates >= 1, "subspace_updates", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        if (count := len(set(self.prompts))) < 2:
            raise UsageError(
                f"{self.name} needs the prompts of several tasks.",
                f"Its option prompts names {count} adapters, and a space is learned from at least two.",
                "Train them with --method prompt_tuning, then give their adapter folders in the recipe's options.",
            )
        given = torch.stack([stored.prompt(self.name, folder, model, self.length) for folder in self.prompts])
        prompt.attach(self.name, model, anatomy, _Autoencoder(given, self.dimension), self.length)

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="subspace", optimizer=self.optimizer, updates=self.subspace_updates),
            Stage(name="code", optimizer=self.optimizer, begin=_freeze),
            Stage(name="collapse", optimizer=self.optimizer, begin=_collapse, updates=0),
        )

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW; the code is trained at ten times the rate at which the network was."""
        made = super().optimizer(model, lr, weight_decay)
        code = getattr(prompt.of(model), "code", None)
        if code is None:
            return made
        groups = [{**group, "params": [p for p in group["params"] if p is not code]} for group in made.param_groups]
        groups.append({"params": [code], "weight_decay": 0.0, "lr_scale": 10.0})
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)

    def penalty(self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Tensor) -> Tensor | None:
        learned = prompt.of(model)
        return learned.loss() if isinstance(learned, _Autoencoder) else None

    def finished(self) -> Method:
        return PromptTuning(length=self.length)

    def positions(self, configuration: PretrainedConfig) -> int:
        return self.length

    def condense(self, model: nn.Module) -> None:
        prompt.condense(model)


@torch.no_grad()
def _freeze(model: nn.Module, anatomy: Anatomy) -> None:
    learned = prompt.of(model)
    assert isinstance(learned, _Autoencoder)
    prompt.put(model, _Code(learned))


@torch.no_grad()
def _collapse(model: nn.Module, anatomy: Anatomy) -> None:
    prompt.put(model, prompt.Prompt(prompt.of(model)().clone()))
