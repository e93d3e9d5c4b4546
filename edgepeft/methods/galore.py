"""GaLore: full-parameter training whose Adam states live in a low-rank subspace of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import rounding


@dataclass(frozen=True, kw_only=True)
class GaLore(Method):
    """Every layer is updated inside backward, as soon as its gradient is whole, and that gradient is then freed."""

    paper = Paper("GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024, "2403.03507")
    kind = "reparametrised"
    saves = ("memory",)
    narrow = {"rank": 8, "period": 4}
    writes_backbone = True
    updates_in_backward = True
    learning_rate = 1e-4

    rank: int = 128
    """Dimension of the subspace; a layer no larger than that is trained by plain Adam."""
    period: int = 200
    """Updates between two choices of the subspace (T in the paper)."""
    scale: float = 0.25
    """Factor on the projected update (alpha in the paper)."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(self.period >= 1, "period", "at least 1")
        self.require(self.scale > 0, "scale", "above 0")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        model.requires_grad_(True)
        weights: list[Any] = [model.get_parameter(f"{name}.weight") for name in anatomy.linears(ROLES)]
        largest = max(min(weight.shape) for weight in weights)
        if self.rank >= largest:
            raise UsageError(
                f"galore cannot work with rank = {self.rank} on this model.",
                f"Its layers are of rank {largest} at most: no gradient would be projected, and no memory saved.",
                f"Use --set options.rank={max(1, largest // 4)} or so, or --method full.",
            )
        for weight in weights:
            weight.galore = True

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return GaLoreAdamW(
            parameters, lr=lr, weight_decay=weight_decay, rank=self.rank, period=self.period, scale=self.scale
        )


BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's
POWERS = 2  # iterations of ``range_basis``


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW that updates each parameter from a hook in backward; ``step`` has nothing left to do.

    States are fp32 whatever the parameter's dtype, as they are small; a bf16 parameter is rounded at random.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        rank: int,
        period: int,
        scale: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.weight_decay, self.rank, self.period, self.scale = weight_decay, rank, period, scale
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in parameters]

    def step(self, closure: Any = None) -> Any:  # the optimizers' own signature is overloaded
        """Nothing: parameters were updated in backward."""

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        lr: float = self.param_groups[0]["lr"]
        state: dict[str, Any] = self.state[parameter]
        step = int(state.get("step", 0))
        projected = getattr(parameter, "galore", False) and min(parameter.shape) > self.rank
        if projected and step % self.period == 0:
            state["basis"] = range_basis(gradient.float(), self.rank)
        low = project(gradient.float(), state["basis"]) if projected else gradient.float()
        parameter.grad = gradient = None  # nothing below needs the full gradient
        if step == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["step"] = step = step + 1
        state["exp_avg"].lerp_(low, 1 - BETA1)
        state["exp_avg_sq"].mul_(BETA2).addcmul_(low, low, value=1 - BETA2)
        del low
        denominator = (state["exp_avg_sq"] / (1 - BETA2**step)).sqrt_().add_(EPSILON)
        update = (state["exp_avg"] / (1 - BETA1**step)).div_(denominator)
        del denominator
        if projected:
            update = unproject(update, state["basis"]).mul_(self.scale)
        decay = self.weight_decay if parameter.dim() > 1 else 0.0
        # Not the parameter: where it is a view of a larger tensor (transformers splits the fused layers of a file), the
        # other views, which backward has still to read, would count as written to.
        rounding.add(parameter.data, update, -lr, 1 - lr * decay)


def range_basis(gradient: Tensor, rank: int) -> Tensor:
    """An orthonormal basis (short side, rank) close to the span of the gradient's leading singular vectors.

    A randomised range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4):
    a full SVD of one 2048 × 8192 layer takes minutes on a CPU.

    Args:
        gradient: (m, n), fp32.
    """
    tall = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.t()  # (short, long)
    basis, _ = torch.linalg.qr(tall @ torch.randn(tall.shape[1], rank, device=tall.device))
    for _ in range(POWERS):
        other, _ = torch.linalg.qr(tall.t() @ basis)
        basis, _ = torch.linalg.qr(tall @ other)
    return basis.contiguous()  # as a checkpoint gives it back: the last bits of products depend on strides


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """(m, n) into the subspace of its shorter side: (rank, n) if m <= n, else (m, rank)."""
    return basis.t() @ gradient if gradient.shape[0] <= gradient.shape[1] else gradient @ basis


def unproject(low: Tensor, basis: Tensor) -> Tensor:
    """The inverse of ``project`` on the subspace."""
    return basis @ low if low.shape[0] == basis.shape[1] and low.shape[1] >= basis.shape[0] else low @ basis.t()
