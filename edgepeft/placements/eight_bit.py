"""AdamW whose states take 8 bits each, quantised in blocks (arXiv 2110.02861), by the kernels of bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgepeft import kernels
from edgepeft.errors import UsageError
from edgepeft.placements import rounding
from edgepeft.surface import CHUNK

BLOCK = 256  # numbers that share a scale: what bitsandbytes' kernels are compiled for; divides CHUNK
SMALLEST = 4096  # numbers: as in bitsandbytes, a smaller tensor keeps its states in fp32
_UPDATE = "bitsandbytes::optimizer_update_8bit_blockwise"


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with two bytes of states for each number, and two fp32 scales for each block.

    On fp32 parameters it is bitsandbytes' AdamW8bit to the bit. A bf16 parameter is updated in fp32, a part at a time,
    and rounded at random: to the nearest, as bitsandbytes does it, its small updates would be lost.
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
        for group in self.param_groups:
            for parameter in group["params"]:  # they are cut where blocks end, not rows
                parameter.data = parameter.data.contiguous()
        device = self.param_groups[0]["params"][0].device
        self._codes = [torch.tensor(code, device=device) for code in codes()]  # no part of the state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # the optimizers' own signature is overloaded
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state.update(_zeros(parameter))
                state["step"] += 1
                gradient = parameter.grad.contiguous().view(-1)
                for first in range(0, parameter.numel(), CHUNK):
                    self._update(group, parameter.view(-1), gradient, state, first)

    def _update(self, group: dict[str, Any], whole: Tensor, gradient: Tensor, state: dict[str, Any], at: int) -> None:
        """A part of a parameter, from its number ``at`` on."""
        functional = kernels.bitsandbytes()
        numbers, blocks = slice(at, at + CHUNK), slice(at // BLOCK, (at + CHUNK) // BLOCK)
        own = whole[numbers]
        exact = own.float()  # the same numbers, not a copy, if it is fp32
        one, other = (state[name].view(-1)[numbers] for name in ("state1", "state2"))
        (beta1, beta2), eps, lr, decay = (group[name] for name in ("betas", "eps", "lr", "weight_decay"))
        given = "adam", gradient[numbers].float(), exact, one
        if "absmax1" in state:
            scales = state["absmax1"][blocks], state["absmax2"][blocks]
            functional.optimizer_update_8bit_blockwise(
                *(*given, other, beta1, beta2, 0.0, 0.0, eps, state["step"], lr, *self._codes, *scales, decay)
            )
        else:
            functional.optimizer_update_32bit(*given, beta1, eps, state["step"], lr, other, beta2, weight_decay=decay)
        if own.dtype is not torch.float32:
            rounding.write(own, exact)


@cache
def codes() -> tuple[list[float], list[float]]:
    """What each byte stands for, as a share of its block's largest: in the first moment, and in the second, unsigned.

    It must be called once where tensors have values before it is called where they are fake.
    """
    functional = kernels.bitsandbytes()
    return functional.create_dynamic_map(signed=True).tolist(), functional.create_dynamic_map(signed=False).tolist()


def _zeros(parameter: Tensor) -> dict[str, Any]:
    """The states before the first update, under the names that bitsandbytes has for them."""
    blocks = -(-parameter.numel() // BLOCK)
    small = parameter.numel() < SMALLEST
    states: dict[str, Any] = {"step": 0}
    for number in (1, 2):
        states[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
        if not small:
            states[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return states


def like(made: torch.optim.Optimizer, lr: float) -> AdamW | None:
    """AdamW in 8 bits over the groups of one in full, with all that a method says of them; None for others."""
    if not isinstance(made, (torch.optim.AdamW, rounding.AdamW)):
        return None
    settings = made.defaults.keys() - {"weight_decay"}  # AdamW's own; a method's are what else is in its groups
    groups = [{key: value for key, value in group.items() if key not in settings} for group in made.param_groups]
    return AdamW(groups, lr=lr)


def check(device: str) -> None:
    """Refuse, before work starts, a kind of device that the installed bitsandbytes has no kernel for.

    Raises:
        UsageError: see above.
    """
    kernels.bitsandbytes()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_UPDATE, device.upper()):
        raise UsageError(
            f"AdamW in 8 bits cannot run on this machine ({device}).",
            "The installed bitsandbytes has no kernel for it.",
            "Leave the optimizer out, or install a newer bitsandbytes: 0.50 has kernels for CPUs and GPUs.",
        )
