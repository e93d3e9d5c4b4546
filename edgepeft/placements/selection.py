"""Training some of a backbone's own parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgepeft.anatomy import Anatomy, body

_PARAMETRIZED = ".parametrizations."


class _Master(nn.Module):
    """Keeps a half-precision parameter in fp32 and hands out its cast.

    Without it an update of 1e-3 to a bf16 weight of 1 rounds to nothing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def train(model: nn.Module, names: Iterable[str]) -> None:
    """Make the named parameters trainable; those in half precision get an fp32 master, a tied one the same all over."""
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            parameter.requires_grad_(True)
            continue
        master = nn.Parameter(parameter.detach().float())
        for module, leaf in _owners(model, parameter):
            setattr(module, leaf, master)
            parametrize.register_parametrization(module, leaf, _Master(parameter.dtype), unsafe=True)


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [(m, leaf) for m in model.modules() for leaf, own in m._parameters.items() if own is parameter]


def own(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The parameters of the layers, norms, embeddings and token logits: all but what sits on them to classify."""
    parts = [*body(model, anatomy), *([anatomy.unembedding] if anatomy.unembedding else [])]
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{part}.") for part in parts)]


def own_but_logits(model: Any, anatomy: Anatomy) -> list[str]:
    """``own`` without the matrix that makes token logits, which most models also read tokens with.

    Every step moves all its rows a little, those of tokens that never occur too: by how far they moved, its entries
    win over all others, and training them changes next to nothing.
    """
    head = model.get_output_embeddings()
    logits = None if head is None else head.weight
    parameters = dict(model.named_parameters())
    return [name for name in own(model, anatomy) if parameters[name] is not logits]


def biases(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The parameters that are added to what a linear layer or a norm makes; in T5 and Llama there are none."""
    return [name for name in own(model, anatomy) if name.rpartition(".")[2] == "bias"]


def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every master hand out its cast in ``dtype``, in a model that was itself cast to it."""
    for module in model.modules():
        if isinstance(module, _Master):
            module.dtype = dtype


def fold(model: nn.Module) -> None:
    """Replace every master by a plain parameter of the master's own precision."""
    module: Any
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for leaf, chain in list(module.parametrizations.items()):
                if isinstance(chain[0], _Master):
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def canonical(name: str) -> str:
    """The name a parameter has without its master: adapter files do not depend on the precision of the backbone."""
    head, found, leaf = name.partition(_PARAMETRIZED)
    return f"{head}.{leaf.removesuffix('.original')}" if found else name
