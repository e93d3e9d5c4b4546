"""What each translation between an adapter of edgepeft's and one of PEFT's is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepeft.backbone import Backbone

Tensors = dict[str, Tensor]
Layers = dict[str, Tensors]
"""A layer's dotted name, then the ends of the names of its tensors."""

TABLE = "prompt_embeddings"


@dataclass(frozen=True)
class Written:
    """An adapter in PEFT's terms: tensors named from the model on, settings, and what a reader should know."""

    tensors: Tensors
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Read:
    """An adapter in edgepeft's terms: the options of its method, tensors, and what a reader should know."""

    options: dict[str, Any]
    tensors: Tensors
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """How one method is stored.

    Attributes:
        kinds: PEFT's names of it; the first is written.
        endings: of the names of PEFT's tensors.
        understood: settings of adapter_config.json that ``read`` translates.
        write: from the method, its tensors and the model with the method in it.
        read: from adapter_config.json, PEFT's tensors and the plain model.
        neutral: what a tensor of a layer that PEFT left alone is filled with; None where only the backbone's own
            weights would do.
        transposed: PEFT has this for GPT-2's transposed linears too.
    """

    kinds: tuple[str, ...]
    endings: tuple[str, ...]
    understood: tuple[str, ...]
    write: Callable[[Any, Tensors, Backbone], Written]
    read: Callable[[Mapping[str, Any], Tensors, Backbone], Read]
    neutral: float | None = None
    transposed: bool = True

    @property
    def before_the_input(self) -> bool:
        """Whether it is a table that stands before the input, and no change of layers."""
        return self.endings == (TABLE,)


def grouped(tensors: Tensors, endings: tuple[str, ...]) -> tuple[Layers, Tensors]:
    """Tensors by layer, and those whose names end in nothing known."""
    layers: Layers = {}
    rest: Tensors = {}
    for name, tensor in tensors.items():
        ending = next((each for each in endings if f".{name}".endswith(f".{each}")), None)
        if ending is None:
            rest[name] = tensor
        else:
            layers.setdefault(name.removesuffix(ending).removesuffix("."), {})[ending] = tensor
    return layers, rest


def flat(layers: Layers) -> Tensors:
    """The opposite of ``grouped``."""
    return {f"{layer}.{ending}": tensor for layer, ends in layers.items() for ending, tensor in ends.items()}


def padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """``tensor`` with zeros up to ``size`` in one dimension."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
