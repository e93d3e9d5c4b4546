"""LT-SFT: full fine-tuning finds the entries that change most; rewound, only they are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import change, selection, sparse
from edgepeft.stage import Stage


@dataclass(frozen=True, kw_only=True)
class LTSFT(Method):
    """The lottery ticket of a fine-tuning: the entries furthest from where they started, trained again from there.

    The first stage trains the change of every weight of layers and embeddings but those of norms, so that it takes the
    memory of full tuning. A classifier's head is dense in both stages and is not rewound; the pooler of a BERT stays as
    it is. So does the matrix of token logits, tied or not: nearly all entries that move furthest would be its, and none
    of them helps. There is no L1 pull to the start, which the authors' masked-language-model script has in both stages
    and their scripts for tasks have not.
    """

    paper = Paper("Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022, "2110.07560")
    kind = "selective"
    writes_backbone = True
    saves = ("disk",)
    version = 2  # 1 changed norms too, and fewer weights
    learning_rate = 5e-5
    narrow = {"density": 0.2}

    density: float = 0.08
    """Share of the weights that are trained in the end: the authors' scripts keep 14,155,776 of multilingual BERT's."""

    def __post_init__(self) -> None:
        self.require(0 < self.density < 1, "density", "a share between 0 and 1")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        norms = tuple(f"{norm}." for norm in anatomy.norms)  # the authors' scripts have --freeze_layer_norm
        names = [name for name in selection.own_but_logits(model, anatomy) if not name.startswith(norms)]
        for place in change.places(model, names):
            change.put(place, change.Dense(place.tensor))

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="full", optimizer=self.optimizer),
            Stage(name="sparse", optimizer=self.optimizer, begin=self._rewind),
        )

    def merge(self, model: nn.Module) -> None:
        sparse.fold(model)
        selection.fold(model)

    def _rewind(self, model: nn.Module, anatomy: Anatomy) -> None:
        sparse.keep(model, change.changed(model), self.density, _distance)


def _distance(place: change.Place) -> torch.Tensor:
    assert isinstance(place.change, change.Dense)
    return place.change.delta.abs()
