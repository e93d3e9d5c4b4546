"""GLoRA: weights and biases of linear layers are scaled and shifted, each in a form of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from edgepeft import precision
from edgepeft.anatomy import ROLES, Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import delta, selection, targets
from edgepeft.precision import StoredLinear, weight_of

FORMS = ("lowrank", "vector", "scalar", "none")


class Support(nn.Module):
    """One of the paper's A to E: a matrix (rows, columns) that starts at zero, as a trained matrix of less.

    lowrank: down (rows, rank) · up (rank, columns); vector: one number for each row; scalar: one number; none: zero.
    """

    def __init__(self, form: str, rows: int, columns: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.form = form
        if form == "lowrank":
            self.down = nn.Parameter(torch.zeros(rows, rank, device=device))
            self.up = nn.Parameter(torch.empty(rank, columns, device=device))
            nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
        elif form != "none":
            self.value = nn.Parameter(torch.zeros(rows if form == "vector" else 1, 1, device=device))

    def forward(self) -> Tensor:
        """Something that broadcasts to (rows, columns), in fp32."""
        return self.down @ self.up if self.form == "lowrank" else self.value


class Generalised(delta.Delta):
    """y → x (W + W ∘ A + B)ᵀ + b + b ∘ D + E + W C.

    W ∘ A is elementwise, as in the authors' code and the only reading under which A has the shape that they give it.
    It is not kept for backward, but made again.
    """

    def __init__(self, linear: nn.Linear | StoredLinear, forms: dict[str, str], rank: int) -> None:
        super().__init__()
        device = next(iter([*linear.parameters(), *linear.buffers()])).device
        rows, columns = linear.out_features, linear.in_features
        sizes = {"a": (rows, columns), "b": (rows, columns), "c": (columns, 1), "d": (rows, 1), "e": (rows, 1)}
        for name, (height, width) in sizes.items():
            if forms[name] != "none" and (name in "ab" or linear.bias is not None):
                self.add_module(name, Support(forms[name], height, width, rank, device))

    def forward(self, x: Tensor, output: Tensor, linear: nn.Module) -> Tensor:
        parts = dict(self.named_children())
        bias: Any = linear.bias
        if "a" in parts:
            if parts["a"].form == "lowrank":
                output = output + _again(self._scaled, x, linear)
            else:
                plain = output if bias is None else output - bias
                output = output + plain * parts["a"]().flatten().to(output.dtype)
        if "b" in parts:
            output = output + self._shifted(x)
        if "c" in parts:
            output = output + _again(self._moved, linear).to(output.dtype)
        if "d" in parts:
            output = output + (bias * parts["d"]().flatten()).to(output.dtype)
        if "e" in parts:
            output = output + parts["e"]().flatten().to(output.dtype)
        return output

    def fold(self, linear: nn.Linear) -> None:
        parts = dict(self.named_children())
        if "c" in parts:
            moved = self._moved(linear)
        if "a" in parts:
            linear.weight.mul_(1 + parts["a"]())
        if "b" in parts:
            linear.weight.add_(parts["b"]())
        if "d" in parts:
            linear.bias.mul_(1 + parts["d"]().flatten())
        if "e" in parts:
            linear.bias.add_(parts["e"]().flatten())
        if "c" in parts:
            linear.bias.add_(moved)

    def _scaled(self, x: Tensor, linear: nn.Module) -> Tensor:
        """x (W ∘ A)ᵀ"""
        weight, a = weight_of(linear), self.get_submodule("a")()
        return F.linear(x.to(weight.dtype), weight * a.to(weight.dtype))

    def _shifted(self, x: Tensor) -> Tensor:
        """x Bᵀ"""
        b: Any = self.get_submodule("b")
        if b.form == "lowrank":
            return precision.linear(precision.linear(x, b.up), b.down)
        exact = torch.promote_types(x.dtype, torch.float32)
        return (x.sum(-1, keepdim=True, dtype=exact) * b.value.flatten()).to(x.dtype)

    def _moved(self, linear: nn.Module) -> Tensor:
        """W C, (out,)"""
        weight = weight_of(linear)
        c = self.get_submodule("c")().expand(weight.shape[1], 1)
        return (weight @ c.to(weight.dtype)).flatten()


def _again(function: Any, *arguments: Any) -> Tensor:
    """Call a function of which nothing is kept for backward but its arguments."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """W + W ∘ A + B and b + b ∘ D + E + W C: LoRA (B) with scales and with trained biases where there are any.

    The paper searches for a form of each for every layer; here one choice holds for all. Where a layer has no bias, as
    in Llama and T5, the paper gives it one for E and W C; here, as in HF PEFT, those two are left out.
    """

    paper = Paper("One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, "2306.07967")
    kind = "reparametrised"
    shardable = True
    learning_rate = 5e-4

    rank: int = 4
    """Rank of what is of low rank."""
    a: str = "lowrank"
    """Scales the weight: lowrank, vector (one number for each output), scalar or none."""
    b: str = "lowrank"
    """Is added to the weight: lowrank, vector, scalar or none."""
    c: str = "vector"
    """Is sent through the weight and added to the bias: lowrank, vector, scalar or none."""
    d: str = "vector"
    """Scales the bias: vector, scalar or none."""
    e: str = "vector"
    """Is added to the bias: vector, scalar or none."""
    targets: tuple[str, ...] = ROLES
    """Roles of the linear layers that are changed."""

    def __post_init__(self) -> None:
        self.require(self.rank >= 1, "rank", "at least 1")
        for option in ("a", "b", "c"):
            self.require(getattr(self, option) in FORMS, option, f"one of {', '.join(FORMS)}")
        for option in ("d", "e"):
            self.require(getattr(self, option) in FORMS[1:], option, f"one of {', '.join(FORMS[1:])}")
        self.require((self.a, self.b) != ("none", "none"), "b", "something else, as a is none too")

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        forms = {name: getattr(self, name) for name in "abcde"}
        names = targets.linears(self.name, anatomy, self.targets)
        if "lowrank" in (self.a, self.b):
            targets.check_rank(self.name, self.rank, model, names)
        for name in names:
            linear: Any = model.get_submodule(name)
            delta.attach(linear, Generalised(linear, forms, self.rank))

    def merge(self, model: nn.Module) -> None:
        delta.fold(model)
        selection.fold(model)
