"""DiffPruning: a change of every weight, made sparse by gates that learn to close."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import change, selection, sparse
from edgepeft.placements.gated import Gated, expected_open
from edgepeft.stage import Stage


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """W + z ∘ Δ with hard-concrete gates z (arXiv 1712.01312) and a price on each that is expected to be open.

    The first stage trains Δ and the gates of all weights of layers, norms and embeddings: two fp32 numbers for each,
    with gradients and two moments, 32 bytes beside the weight itself, where full tuning takes 16 in fp32 and 8 in bf16.
    The second keeps the largest entries of z ∘ Δ and trains them on (section 3.2). Gates that whole tensors share, the
    paper's structured variant, are not here. A classifier's head is dense in both, but the pooler of a BERT stays as it
    is. So does the matrix of token logits, tied or not: nearly all the largest entries would be its, and none of them
    helps.
    """

    paper = Paper("Parameter-Efficient Transfer Learning with Diff Pruning", 2020, "2012.07463")
    kind = "selective"
    writes_backbone = True
    saves = ("disk",)
    learning_rate = 5e-5
    narrow = {"density": 0.2}

    density: float = 0.005
    """Share of the weights that are changed in the end."""
    price: float = 1.25e-7
    """Added to the loss for each gate that is expected to be open; this and the rest are the authors' settings."""
    stretch: float = 1.5
    """Gates are drawn between -stretch and stretch, and cut off at 0 and 1."""
    start: float = 5.0
    """Where the gates' parameters start: nearly all open."""
    gate_rate: float = 0.1
    """Highest learning rate of the gates."""

    def __post_init__(self) -> None:
        self.require(0 < self.density < 1, "density", "a share between 0 and 1")
        self.require(self.price >= 0, "price", "at least 0")
        self.require(self.stretch >= 1, "stretch", "at least 1")
        self.require(self.gate_rate > 0, "gate_rate", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        for place in change.places(model, selection.own_but_logits(model, anatomy)):
            change.put(place, Gated(place.tensor, start=self.start, stretch=self.stretch))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="gates", optimizer=self._optimizer),
            Stage(name="fixed mask", optimizer=self.optimizer, begin=self._prune),
        )

    def penalty(self, model: nn.Module, batch: object, outputs: Tensor) -> Tensor | None:
        gates = [module.gate for module in model.modules() if isinstance(module, Gated)]
        if not gates:
            return None
        return self.price * torch.stack([expected_open(gate) for gate in gates]).sum()

    def merge(self, model: nn.Module) -> None:
        sparse.fold(model)
        selection.fold(model)

    def _optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        gates = [module.gate for module in model.modules() if isinstance(module, Gated)]
        known = set(map(id, gates))
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": rest, "weight_decay": weight_decay},
            # The price of a gate is so small that, clipped together with the changes, it would move nothing.
            {"params": gates, "weight_decay": 0.0, "lr_scale": self.gate_rate / lr, "clipped_apart": True},
        ]
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    def _prune(self, model: nn.Module, anatomy: Anatomy) -> None:
        sparse.keep(model, change.changed(model), self.density, lambda place: _kept(place).abs(), start=_kept)


def _kept(place: change.Place) -> Tensor:
    assert isinstance(place.change, Gated)
    return place.change.settled()
