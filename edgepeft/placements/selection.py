"""Training some of a backbone's own parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
    """Make the named parameters trainable; those in half precision get an fp32 master."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, leaf)
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            parameter.requires_grad_(True)
            continue
        dtype = parameter.dtype
        setattr(module, leaf, nn.Parameter(parameter.detach().float()))
        parametrize.register_parametrization(module, leaf, _Master(dtype), unsafe=True)


def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every master hand out its cast in ``dtype``, in a model that was itself cast to it."""
    for module in model.modules():
        if isinstance(module, _Master):
            module.dtype = dtype


def fold(model: nn.Module) -> None:
    """Replace every master by a plain parameter of the master's own precision."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for leaf, chain in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
                if isinstance(chain[0], _Master):
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def canonical(name: str) -> str:
    """The name a parameter has without its master: adapter files do not depend on the precision of the backbone."""
    head, found, leaf = name.partition(_PARAMETRIZED)
    return f"{head}.{leaf.removesuffix('.original')}" if found else name
