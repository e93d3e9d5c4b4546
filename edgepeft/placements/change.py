"""A trained change of any of a backbone's own tensors, of which nothing dense is kept between forward and backward."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from edgepeft.precision import matmul_dtype


class Change(nn.Module):
    """What a frozen tensor becomes; it stands where torch keeps a tensor's parametrization."""

    draws: ClassVar[bool] = False  # random numbers

    @abstractmethod
    def trained(self) -> tuple[Tensor, ...]:
        """The trained tensors."""

    @abstractmethod
    def made(self, frozen: Tensor, *trained: Tensor) -> Tensor:
        """The changed tensor, of the shape of ``frozen``, in its dtype or in fp32."""

    def forward(self, frozen: Tensor) -> Tensor:
        """The changed tensor, as the module reads it."""
        return self.made(frozen, *self.trained()).to(frozen.dtype)


class Dense(Change):
    """W + Δ with a trained Δ of the shape of W, zero at first and in fp32 whatever the dtype of W."""

    def __init__(self, frozen: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(frozen, dtype=torch.float32))

    def trained(self) -> tuple[Tensor, ...]:
        return (self.delta,)

    def made(self, frozen: Tensor, *trained: Tensor) -> Tensor:
        return frozen + trained[0]


@dataclass(frozen=True)
class Place:
    """A tensor of the backbone, and the modules that read it: several where embeddings are tied."""

    tensor: Tensor
    change: Change | None
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)


def places(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """The places of named parameters that nothing changes yet, in the order of ``names``."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), Place(parameter, None)).owners.append((module, leaf))
    return [found[id(model.get_parameter(name))] for name in names]


def changed(model: nn.Module) -> list[Place]:
    """The places that have a change, in the order of the model."""
    found: dict[int, Place] = {}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for leaf, chain in chains.items():
                if isinstance(chain[0], Change):
                    place = found.setdefault(id(chain.original), Place(chain.original, chain[0]))
                    place.owners.append((module, leaf))
    return list(found.values())


def put(place: Place, change: Change) -> None:
    """Let a place have ``change``, instead of the one it has, if any. What it changes is frozen."""
    place.tensor.requires_grad_(False)
    for module, leaf in place.owners:
        if place.change is not None:
            chains: Any = module.parametrizations
            chains[leaf][0] = change
            continue
        if type(module) is nn.Linear and leaf == "weight":
            module.__class__ = _Remade
        parametrize.register_parametrization(module, leaf, change, unsafe=True)


def remove(place: Place) -> None:
    """Leave a place as the backbone had it."""
    for module, leaf in place.owners:
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        if type(module) is _Remade and not parametrize.is_parametrized(module):  # its bias may have a change as well
            plain: Any = module
            plain.__class__ = nn.Linear


def fold(model: nn.Module) -> None:
    """Write every change into its tensor and remove it."""
    for place in changed(model):
        assert place.change is not None
        with torch.no_grad():
            place.tensor.copy_(place.change.eval()(place.tensor))
        remove(place)


class _Remade(nn.Linear):
    """A linear layer whose changed weight is made once to go forward and once to go back, and freed each time."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.parametrizations
        chain = parts.weight
        return _RemadeMatmul.apply(x, self.bias, chain.original, chain[0], *chain[0].trained())


class _RemadeMatmul(torch.autograd.Function):
    """``x @ W.T + b`` where W is ``change.made(frozen, *trained)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, frozen: Tensor, change: Change, *trained: Tensor) -> Tensor:
        ctx.frozen, ctx.change, ctx.dtype = frozen, change, matmul_dtype(x.dtype, x.device)
        ctx.random = _random_state(x.device) if change.draws else None
        ctx.save_for_backward(x, *trained)
        weight = change.made(frozen.to(ctx.dtype), *trained).to(ctx.dtype)
        return F.linear(x.to(ctx.dtype), weight, None if bias is None else bias.to(ctx.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        gradient = grad[0].to(ctx.dtype)
        leaves = [tensor.detach().requires_grad_() for tensor in trained]
        with torch.enable_grad(), _drawing_again(ctx.random, x.device):
            weight = ctx.change.made(ctx.frozen.to(ctx.dtype), *leaves).to(ctx.dtype)
        to_x = (gradient @ weight.detach()).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        to_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2).to(ctx.dtype)
        return to_x, to_bias, None, None, *torch.autograd.grad(weight, leaves, to_weight)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _drawing_again(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the random numbers that were drawn from ``state`` on, and leave the generator as it is."""
    if state is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
