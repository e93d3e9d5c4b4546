"""S4: four groups of layers, each trained in the ways that a search found best for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import functional as F

from edgepeft.anatomy import Anatomy
from edgepeft.methods.base import Method, Paper
from edgepeft.methods.lora import LowRank
from edgepeft.placements import attention, bottleneck, delta, prefix, selection, targets
from edgepeft.stage import Stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GROUPS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "bias"), ("prefix", "bias", "lora"))
SPINDLE = (1, 2, 2, 1)  # layers of the four groups, relative to each other: fewer at the ends
ROLES = ("query", "value", "cross_query", "cross_value")


def group(layer: int, layers: int) -> int:
    """The group, from 0, of a layer in a stack: the one its middle falls into."""
    middle, end = (layer + 0.5) / layers, 0.0
    for number, share in enumerate(SPINDLE):
        end += share / sum(SPINDLE)
        if middle < end:
            return number
    raise AssertionError("the shares add up to 1")


@dataclass(frozen=True, kw_only=True)
class S4(Method):
    """From the input on: adapters and LoRA; adapters and prefixes; those and biases; prefixes, biases and LoRA.

    The groups form a spindle in each stack: a sixth of the layers, two thirds in two groups, a sixth; of fewer than six
    layers the outer groups may have none. Biases are those there are: T5 and Llama have none, and train the rest.
    Where one layer makes queries, keys and values (GPT-2), LoRA's change is of all three.
    """

    paper = Paper("Parameter-Efficient Fine-Tuning Design Spaces", 2023, "2301.01821")
    kind = "hybrid"
    merges = False
    obstacle = prefix.OBSTACLE
    identity_at_start = False
    overhead = "bottlenecks, prefixes and low-rank changes, each in some layers"
    narrow = {"length": 5, "bottleneck": 16, "reduction": 4}
    learning_rate = 5e-4

    reduction: int = 16
    """How many times narrower an adapter is than the backbone."""
    length: int = 10
    """Tokens of the prefixes."""
    bottleneck: int = 512
    """Width of the network that makes the prefixes while training; 0 trains the prefixes themselves."""
    rank: int = 8
    """Rank of LoRA's changes of queries and values."""

    def __post_init__(self) -> None:
        self.require(self.reduction >= 1, "reduction", "at least 1")
        self.require(self.length >= 1, "length", "at least 1")
        self.require(self.bottleneck >= 0, "bottleneck", "a width, or 0 for no network")
        self.require(self.rank >= 1, "rank", "at least 1")

    def depths(self) -> tuple[int, int]:
        return sum(SPINDLE), 2 * sum(SPINDLE)

    def inject(self, model: nn.Module, anatomy: Anatomy) -> None:
        ways: dict[str, tuple[str, ...]] = {}
        for number in range(len(anatomy.stacks)):
            blocks = [block for block in anatomy.blocks if block.stack == number]
            ways |= {block.path: GROUPS[group(layer, len(blocks))] for layer, block in enumerate(blocks)}

        def having(way: str, name: str) -> bool:
            return any(way in found and name.startswith(f"{path}.") for path, found in ways.items())

        device = next(model.parameters()).device
        selection.train(model, [name for name in selection.biases(model, anatomy) if having("bias", name)])
        targets.check_rank(self.name, self.rank, model, anatomy.linears(ROLES))
        for name in anatomy.linears(ROLES):
            if having("lora", name):
                linear: Any = model.get_submodule(name)
                delta.attach(linear, LowRank(linear, self.rank, 1.0, 0.0))
        for part in anatomy.sub_layers(("attention", "feed_forward")):
            if having("adapter", part.reader):
                wide = bottleneck.width(model, part)
                size = bottleneck.size(self.name, wide, self.reduction)
                bottleneck.after(model, part, bottleneck.dense(wide, size, F.gelu, device))
        where = [site for site in attention.sites(model, anatomy) if having("prefix", site.path)]
        prefix.attach(self.name, model, anatomy, where, self.length, self.bottleneck)

    def stages(self) -> tuple[Stage, ...]:
        done = Stage(name="collapse", optimizer=self.optimizer, begin=prefix.collapse, updates=0)
        return (*super().stages(), done)

    def positions(self, configuration: PretrainedConfig) -> int:
        return prefix.positions(self.length, configuration)
