"""Updates of weights that are trained in bf16: rounded at random, up or down, so that small ones are not lost.

A bf16 number has 8 significant bits. Rounded to the nearest, an update below 1/512 of a weight never moves it, and a
second moment that decays by 1/1000 never falls. Rounded up with the probability that is due, both are right on average
(stochastic rounding; Zamirai et al., arXiv 2010.06192, for training in bf16 alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from edgepeft import shards
from edgepeft.surface import CHUNK

_DROPPED = 0xFFFF  # the bits of an fp32 number that bf16 has no room for
_NAN = 0x7FC00000  # that of a CPU; a GPU computes 0x7FFFFFFF, which anything that is added turns into -0


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with states of each parameter's own dtype and arithmetic in fp32.

    So bf16 weights take 8 bytes each, gradient included, as with torch's AdamW, which loses their small updates.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the optimizers' own signature is overloaded
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] = step = int(state.get("step", 0)) + 1
                held = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for own, gradient, average, square in _parts(*map(shards.own, held)):
                    gradient = gradient.float()
                    first = average.float().lerp_(gradient, 1 - beta1)
                    second = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    change = first / (1 - beta1**step)
                    change.div_((second / (1 - beta2**step)).sqrt_().add_(group["eps"]))
                    write(average, first)
                    write(square, second)
                    _add(own, change, -group["lr"], 1 - group["lr"] * group["weight_decay"])


@torch.no_grad()
def add(parameter: Tensor, change: Tensor, factor: float, shrink: float = 1.0) -> None:
    """parameter ← shrink · parameter + factor · change; ``change`` is fp32 and of the same shape."""
    for own, part in _parts(parameter, change):
        _add(own, part, factor, shrink)


def write(target: Tensor, value: Tensor) -> None:
    """Copy fp32 numbers into ``target``, rounded at random if it is bf16; ``value`` is then used up."""
    if target.dtype is torch.bfloat16:
        words = -(-value.numel() // 4)  # 64 random bits serve four numbers: drawing them is what takes time
        drawn = torch.empty(words, dtype=torch.int64, device=value.device).random_(-(2**63), None)
        noise = drawn.view(torch.int16)[: value.numel()].view(value.shape).int().bitwise_and_(_DROPPED)
        bits = value.view(torch.int32).clamp_(max=_NAN)
        bits.add_(noise).bitwise_and_(~_DROPPED)  # what is left is exact in bf16
    target.copy_(value)


def _add(own: Tensor, change: Tensor, factor: float, shrink: float) -> None:
    value = own.float()
    if shrink != 1:
        value.mul_(shrink)
    write(own, value.add_(change, alpha=factor))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors of one shape, some rows at a time."""
    flat = [torch.atleast_1d(tensor) for tensor in tensors]
    rows = max(1, CHUNK * len(flat[0]) // max(1, flat[0].numel()))
    for first in range(0, len(flat[0]), rows):
        yield tuple(tensor[first : first + rows] for tensor in flat)
