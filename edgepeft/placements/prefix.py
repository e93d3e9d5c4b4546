"""Trained keys and values before those of attentions: prefixes, plain or made by a network, weighed by gates or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.placements import attention
from edgepeft.placements.attention import CHILD, SHARES, Site, States
from edgepeft.placements.gate import Gate
from edgepeft.placements.positions import check, shift
from edgepeft.tasks import default_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

STD = 0.02  # of what starts random, as in UniPELT's code; that of Li and Liang, and of He et al., has tokens of N(0, 1)

# Why prefixes and prompts cannot be merged: a method's obstacle.
OBSTACLE = "They are tokens that every other token attends to, and no weight of the backbone can stand for a token."


class Plain(nn.Module):
    """Keys and values that are trained themselves, kept in fp32."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def forward(self) -> States:
        return self.keys, self.values


class Trunk(nn.Module):
    """What the prefixes of one group of attentions share: tokens, and the narrow layer of the network they go through.

    Li and Liang (arXiv 2101.00190), section 4.3: a prefix trained directly is unstable.
    """

    def __init__(self, length: int, hidden: int, bottleneck: int, device: torch.device) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, hidden, device=device) * STD)
        self.down = nn.Linear(hidden, bottleneck, device=device)

    def forward(self) -> Tensor:
        """(length, bottleneck)."""
        return torch.tanh(self.down(self.tokens))


class Reparametrised(nn.Module):
    """Keys and values as linear functions of a trunk."""

    def __init__(self, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.up = nn.Linear(trunk.down.out_features, 2 * width, device=trunk.tokens.device)

    def forward(self) -> States:
        keys, values = self.up(self.trunk()).chunk(2, dim=-1)
        return keys, values


class Scaled(nn.Module):
    """Keys and values times one trained number, 1 at first."""

    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix
        self.scale = nn.Parameter(torch.ones((), device=next(prefix.parameters()).device))

    def forward(self) -> States:
        keys, values = self.prefix()
        return keys * self.scale, values * self.scale


def attach(method: str, model: Any, anatomy: Anatomy, where: Sequence[Site], length: int, bottleneck: int) -> None:
    """Put a prefix of ``length`` tokens before each attention of ``where``.

    In decoders the input's positions begin behind it, as in its authors' code and in HF PEFT.

    Args:
        bottleneck: width of the network that makes the prefix, one for each group of attentions; 0 for none.

    Raises:
        UsageError: a decoder's prefix leaves no positions to the input.
    """
    decoder = attention.is_causal_decoder(model, anatomy)
    if decoder:
        check(method, length, model.config)
    device = next(model.parameters()).device
    trunks: dict[tuple[int, bool], Trunk] = {}
    for site in where:
        module = model.get_submodule(site.path)
        made: nn.Module
        if bottleneck:
            if site.group not in trunks:
                trunks[site.group] = Trunk(length, site.hidden, bottleneck, device)
            made = Reparametrised(trunks[site.group], site.width)
        else:
            keys, values = torch.randn(2, length, site.width, device=device) * STD
            made = Plain(keys, values)
        module.add_module(CHILD, made)
        attention.reads_more(module)
    if decoder:
        shift(model.get_submodule(anatomy.stacks[0].owner), length)


def positions(length: int, configuration: PretrainedConfig) -> int:
    """How many of a backbone's positions a prefix takes: a decoder's its length, others' none."""
    return length if default_task(configuration) == "causal-lm" else 0


def scale(module: nn.Module) -> None:
    """Multiply the prefix of an attention by a trained number."""
    setattr(module, CHILD, Scaled(module.get_submodule(CHILD)))


def weigh(module: nn.Module, gate: Gate) -> None:
    """Let ``gate``, of one output or one for each prefix token, weigh the prefix of an attention, query by query.

    It reads what the queries are made of. What it gives multiplies the weight that softmax gives a prefix token before
    all weights are divided by their sum: 0 takes the token out of the attention, 1 leaves it as it is.
    """
    module.add_module("gate", gate)
    module.register_forward_pre_hook(_weigh, with_kwargs=True)


def collapse(model: nn.Module, anatomy: Anatomy) -> None:
    """Replace every network by the plain prefix that it makes, which is trained from then on."""
    for module in list(model.modules()):
        made = getattr(module, CHILD, None)
        if isinstance(made, Reparametrised):
            with torch.no_grad():
                keys, values = made()
            setattr(module, CHILD, Plain(keys.contiguous(), values.contiguous()))


def _weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gate: Any = module.gate
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, SHARES: gate.log(hidden)}
