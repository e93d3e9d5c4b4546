"""Ladder Side-Tuning: a narrow network beside a frozen backbone, through which nothing is backpropagated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy, Block, is_norm
from edgepeft.errors import UsageError
from edgepeft.methods.base import Method, Paper
from edgepeft.placements import ladder, selection
from edgepeft.precision import weight_of


@dataclass(frozen=True, kw_only=True)
class LST(Method):
    """A side network that starts as a pruned copy of the backbone and adds nothing at first.

    The backbone may be packed and runs without a graph.

    Not in the paper: the side state is added to the backbone's last hidden states through a zero-initialised
    projection, so that training starts exactly at the backbone, also where there is no generation head to share
    (classifiers).
    """

    paper = Paper("LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", 2022, "2206.06522")
    kind = "additive"
    merges = False
    obstacle = "The side network is a second network beside it, not a change of its weights."
    overhead = "a side network"
    narrow = {"reduction": 4}
    backpropagates = False
    learning_rate = 2e-3

    reduction: int = 8
    """How many times narrower the side network is than the backbone; at least 4."""
    layers: float = 0.5
    """Share of the backbone's layers that have a side layer, evenly spaced."""

    def __post_init__(self) -> None:
        self.require(0 < self.layers <= 1, "layers", "a share above 0, up to 1")

    def depths(self) -> tuple[int, int]:
        even = math.lcm(2, Fraction(self.layers).limit_denominator(12).denominator)
        return even, 2 * even

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        config: Any = model.config
        before = {id(parameter) for parameter in model.parameters()}
        stacks = [[b for b in anatomy.blocks if b.stack == number] for number in range(len(anatomy.stacks))]
        self._check(model, stacks)
        kept = [_important_features(model, blocks, self.reduction) for blocks in stacks]
        for number, blocks in enumerate(stacks):
            owner: Any = model.get_submodule(anatomy.stacks[number].owner)
            self._build(model, owner.config if "config" in vars(owner) else config, blocks, kept[number], kept[0])
            if number + 1 < len(stacks):
                entry: Any = model.get_submodule(f"{blocks[0].path}.entry")
                norm = next(m for m in owner.children() if is_norm(m))
                like = next(norm.parameters())
                ladder.bridge(norm, ladder.Bridge(entry.ladder, _norm(len(kept[number]), like)))
        selection.train(model, [name for name, p in model.named_parameters() if id(p) not in before])

    def _check(self, model: nn.Module, stacks: list[list[Block]]) -> None:
        """Every head must stay whole, and of a rotated one every stride-th frequency is kept."""
        config: Any = model.config
        hidden = _width(model, stacks[0][0])
        output: Any = model.get_submodule(stacks[0][0].linears["output"][0])
        head = output.in_features // config.num_attention_heads
        rotary = (getattr(module, "inv_freq", None) for module in model.modules())
        frequencies = [len(inverse) for inverse in rotary if isinstance(inverse, Tensor)]
        divided = math.gcd(hidden, head, *frequencies)
        if self.reduction < 4 or divided % self.reduction:
            fitting = [str(number) for number in range(4, divided + 1) if divided % number == 0]
            raise UsageError(
                f"lst: a reduction of {self.reduction} does not fit this model.",
                f"It must be at least 4 and divide the hidden size, {hidden}, and the width of a head, {head}"
                + (f", with its {frequencies[0]} rotary frequencies." if frequencies else "."),
                f"Use --set options.reduction={fitting[0]}." if fitting else "Use another method: lora.",
            )

    def _build(self, model: nn.Module, config: Any, blocks: list[Block], features: Tensor, source: Tensor) -> None:
        """One ladder beside one stack, from its hidden ``features`` and the encoder's, ``source``."""
        whole: Any = model.config
        rails = ladder.Ladder()
        wanted = max(1, round(len(blocks) * self.layers))
        chosen = [(number + 1) * len(blocks) // wanted - 1 for number in range(wanted)]
        first = model.get_submodule(blocks[0].path)
        reference = next(p for p in first.parameters() if p.is_floating_point())
        width = _width(model, blocks[0])
        place = {"device": reference.device, "dtype": reference.dtype}
        ladder.enter(first, ladder.Entry(rails, _selecting(width, features, place)))
        for number, block in enumerate(blocks):
            layer = model.get_submodule(block.path)
            if "cross_query" in block.linears:
                key: Any = model.get_submodule(block.linears["cross_key"][0])
                ladder.split_widening(layer, rails, key.in_features)
            if number not in chosen:
                continue
            side = ladder.narrow_layer(layer, config, self.reduction, number, reference)
            _prune(layer, side, block, features, source, self.reduction)
            order = len(blocks) + chosen.index(number)
            rung = ladder.Rung(rails, side, _selecting(width, features, place), self.reduction, order)
            top = None
            if number == chosen[-1]:
                if block.stack == 0 and "cross_query" not in block.linears and whole.is_encoder_decoder:
                    pass  # an encoder hands its side states to the decoder's ladder instead
                else:
                    up = nn.Linear(len(features), width, bias=False, **place)
                    nn.init.zeros_(up.weight)
                    top = ladder.Top(_norm(len(features), reference), up)
            ladder.step_beside(layer, rung, top)


def _width(model: nn.Module, block: Block) -> int:
    linear: Any = model.get_submodule(block.linears["ffn_in"][0])
    width: int = linear.in_features
    return width


def _norm(width: int, like: Tensor) -> nn.LayerNorm:
    return nn.LayerNorm(width, device=like.device, dtype=like.dtype)


def _selecting(width: int, features: Tensor, place: dict[str, Any]) -> nn.Linear:
    """A projection (width → len(features)) that starts by picking ``features``."""
    linear = nn.Linear(width, len(features), **place)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[torch.arange(len(features), device=linear.weight.device), features] = 1
        linear.bias.zero_()
    return linear


def _largest(importance: Tensor, count: int) -> Tensor:
    return importance.topk(count).indices.sort().values


def _important_features(model: nn.Module, blocks: list[Block], reduction: int) -> Tensor:
    """The hidden features that the stack's feed-forward layers read with the largest weights (L1), ascending."""
    importance = sum(
        weight_of(model.get_submodule(n)).detach().float().abs().sum(0) for b in blocks for n in b.linears["ffn_in"]
    )
    assert isinstance(importance, Tensor)
    return _largest(importance, len(importance) // reduction)


def _prune(layer: nn.Module, side: nn.Module, block: Block, features: Tensor, source: Tensor, stride: int) -> None:
    """Copy into ``side`` the part of ``layer`` that belongs to its features.

    Hidden features are ``features`` (the encoder's, ``source``, where cross-attention reads); feed-forward features are
    those written with the largest weights; of each head it is every stride-th dimension, which keeps rotary frequencies
    what they were.
    """
    local = {name.removeprefix(f"{block.path}."): role for role, names in block.linears.items() for name in names}
    out = weight_of(layer.get_submodule(block.linears["ffn_out"][0].removeprefix(f"{block.path}."))).detach().float()
    inner = _largest(out.abs().sum(0), out.shape[1] // stride)
    for name, role in local.items():
        wide: Any = layer.get_submodule(name)
        narrow: Any = side.get_submodule(name)
        weight = weight_of(wide).detach().float()
        rows = {"ffn_in": inner}.get(role, features if role.endswith(("output", "ffn_out")) else None)
        columns = {"ffn_out": inner, "cross_key": source, "cross_value": source}.get(role, features)
        if role.endswith("output"):
            columns = torch.arange(0, weight.shape[1], stride, device=weight.device)
        if rows is None:
            rows = torch.arange(0, weight.shape[0], stride, device=weight.device)
        elif role == "ffn_in" and weight.shape[0] > out.shape[1]:  # gate and up fused in one layer
            rows = torch.cat([rows, rows + out.shape[1]])
        with torch.no_grad():
            narrow.weight.copy_(weight[rows][:, columns])
            if narrow.bias is not None:
                narrow.bias.copy_(wide.bias.detach()[rows])
    for name, norm in side.named_modules():
        if is_norm(norm):
            for leaf, value in norm.named_parameters():
                old = layer.get_submodule(name).get_parameter(leaf).detach()
                hidden = len(value) == len(features) and len(old) == len(features) * stride
                with torch.no_grad():
                    value.copy_(old[features] if hidden else old[:: len(old) // len(value)])
