"""FISH mask: only the weights with the largest Fisher information are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import change, selection, sparse
from edgepeft.stage import Stage

CHILD = "fisher"


@dataclass(frozen=True, kw_only=True)
class FishMask(Method):
    """A fixed sparse mask over the weights, from the squared gradients of single examples before training.

    These are the diagonal of the empirical Fisher information, that of the data's own labels (section 2.2). They take
    one fp32 number a weight, and a gradient of each, while they are gathered; training takes next to nothing. They are
    gathered with dropout, where the authors' code has none. The weights are those of layers, norms, embeddings and
    token logits; the pooler of a BERT stays as it is.
    """

    paper = Paper("Training Neural Networks with Fixed Sparse Masks", 2021, "2111.09839")
    kind = "selective"
    writes_backbone = True
    saves = ("disk",)
    learning_rate = 5e-5
    narrow = {"density": 0.2, "examples": 8}

    density: float = 0.005
    """Share of the weights that are trained; the paper's tables have 0.005."""
    examples: int = 1024
    """Examples of which gradients are squared, as the authors' scripts have it; these updates change nothing."""

    def __post_init__(self) -> None:
        self.require(0 < self.density < 1, "density", "a share between 0 and 1")
        self.require(self.examples >= 1, "examples", "at least 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = selection.own(model, anatomy)
        for name in names:
            model.get_parameter(name).requires_grad_(True)
        model.add_module(CHILD, _Fisher(model, names))

    def stages(self) -> tuple[Stage, ...]:
        measuring = Stage(name="fisher", optimizer=_Squares, updates=self.examples, one_by_one=True, measures=True)
        return measuring, Stage(name="sparse", optimizer=self.optimizer, begin=self._mask)

    def merge(self, model: nn.Module) -> None:
        sparse.fold(model)
        selection.fold(model)

    def _mask(self, model: nn.Module, anatomy: Anatomy) -> None:
        fisher: Any = model.get_submodule(CHILD)
        places = change.places(model, fisher.names)
        of = {id(place.tensor): total for place, total in zip(places, fisher.buffers(), strict=True)}
        sparse.keep(model, places, self.density, lambda place: of[id(place.tensor)])
        delattr(model, CHILD)


class _Fisher(nn.Module):
    """For each of a model's named parameters the sum of its squared gradients, in fp32."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for number, name in enumerate(names):
            total = torch.zeros_like(model.get_parameter(name), dtype=torch.float32)
            self.register_buffer(str(number), total, persistent=False)


class _Squares(torch.optim.Optimizer):
    """Adds up squared gradients in the model's ``fisher``; parameters stay as they are."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        fisher: Any = model.get_submodule(CHILD)
        measured = [model.get_parameter(name) for name in fisher.names]
        super().__init__(measured, {"lr": lr})
        self.measured: list[tuple[nn.Parameter, Tensor]] = list(zip(measured, fisher.buffers(), strict=True))
        self.others = [p for p in model.parameters() if p.requires_grad and id(p) not in set(map(id, measured))]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the optimizers' own signature is overloaded
        """Add the squares of the gradients."""
        for parameter, total in self.measured:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                total.addcmul_(gradient, gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients, those of a classifier's head too."""
        for parameter in [*(p for p, _ in self.measured), *self.others]:
            parameter.grad = None
