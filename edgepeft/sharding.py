"""What one of several devices holds that share a model fully (FSDP2), from the surface of a single one.

Under DDP there is no memory to work out: each device holds what one alone does, as gradients are added up where they
are (``ranks.Ranks.sum``). What NCCL keeps for sending is in neither.

What is sent is that of ring algorithms (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2), 2009), in which every
device sends as much as it receives: of n devices (n - 1) shares to put tensors together from their shares, as much to
add them up into shares, and twice that to add them up everywhere.

FSDP2 (``torch.distributed.fsdp.fully_shard``, PyTorch 2.13) is taken to wrap every layer and the root, as accelerate's
transformer policy does, to reshard after forward, and to reduce the gradients of every microbatch. Each parameter is
cut along its first dimension into equal shares; the last ones are padded. Gradients and optimizer states are cut alike.
Packed weights (int8, NF4) are buffers, which it does not cut: every device holds all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from edgepeft.roofline import Work
from edgepeft.surface import CHUNK, KINDS, Moment, Surface


@dataclass(frozen=True)
class Shape:
    """Parameters that are alike.

    Attributes:
        own: whether they are the backbone's; the method added the others.
        rows: of the first dimension, which is cut; 0 of a scalar. ``row_bytes``: what one of them takes.
        count: how many such parameters there are, carried on from models of fewer layers: see ``units``.
    """

    own: bool
    trained: bool
    rows: int
    row_bytes: int
    count: float


@dataclass(frozen=True)
class Unit:
    """What is put together at once: the parameters outside of layers, or those of one of ``count`` layers alike."""

    count: float
    shapes: tuple[Shape, ...]

    def plain(self) -> list[Any]:
        """As JSON, for files: see ``read``."""
        return [self.count, [list(map(_short, astuple(shape))) for shape in self.shapes]]


def _short(number: float) -> float:
    """Truth values and what is whole as whole numbers: files stay small."""
    return int(number) if number == int(number) else number


def read(plain: Sequence[Any]) -> Unit:
    """The opposite of ``Unit.plain``."""
    shapes = (Shape(bool(own), bool(trained), *sizes) for own, trained, *sizes in plain[1])
    return Unit(plain[0], tuple(shapes))


@dataclass(frozen=True)
class Inventory:
    """Bytes of the parameters of a model: of all, and of one device's share, padding included.

    Attributes:
        weights, adapter, trained: (all, share) of the backbone's own, of what the method added, of what is trained.
        chunks: the same of what is trained, counted in as much as an optimizer of bf16 works on at a time.
        root, layer: of the parameters outside of layers, and of the largest layer, put together again from the shares;
            ``root_trained`` and ``layer_trained``: of those among them that are trained.
        devices: how many there are.
        divisible: whether FSDP2 takes every parameter; it refuses scalars.
    """

    weights: tuple[int, int]
    adapter: tuple[int, int]
    trained: tuple[int, int]
    chunks: tuple[float, float]
    root: int
    layer: int
    root_trained: int
    layer_trained: int
    devices: int
    divisible: bool

    @property
    def share(self) -> float:
        """Of gradients and optimizer states, what one device holds."""
        return self.trained[1] / max(1, self.trained[0])


def inventory(units: Sequence[Unit], devices: int) -> Inventory:
    """The inventory of one of several devices.

    Args:
        units: first the parameters outside of layers, then each kind of layer.
    """

    def both(wanted: Callable[[Shape], bool]) -> tuple[int, int]:
        sizes = [(unit.count * each.count, each) for unit in units for each in unit.shapes if wanted(each)]
        whole = sum(count * max(1, each.rows) * each.row_bytes for count, each in sizes)
        return round(whole), round(sum(count * share_bytes(each, devices) for count, each in sizes))

    def gathered(shapes: Iterable[Shape]) -> int:
        return devices * round(sum(each.count * share_bytes(each, devices) for each in shapes))

    def chunks(devices: int) -> float:
        trained = [(unit.count * each.count, each) for unit in units for each in unit.shapes if each.trained]
        return sum(count * math.ceil(share_bytes(each, devices) / (2 * CHUNK)) for count, each in trained)

    root, *layers = units
    largest = max((unit for unit in layers if unit.count > 0), key=lambda unit: gathered(unit.shapes))
    return Inventory(
        weights=both(lambda each: each.own),
        adapter=both(lambda each: not each.own),
        trained=both(lambda each: each.trained),
        chunks=(chunks(1), chunks(devices)),
        root=gathered(root.shapes),
        layer=gathered(largest.shapes),
        root_trained=gathered(each for each in root.shapes if each.trained),
        layer_trained=gathered(each for each in largest.shapes if each.trained),
        devices=devices,
        divisible=all(each.rows for unit in units for each in unit.shapes),
    )


def share_bytes(shape: Shape, devices: int) -> int:
    """What the first of several devices holds of one such parameter, cut along its first dimension."""
    return -(-max(1, shape.rows) // devices) * shape.row_bytes


def replicated(surface: Surface, devices: int) -> Surface:
    """The surface of one device of several under DDP as edgepeft does it: gradients are added up once an update."""
    _, held = surface.at(1, ("update",))
    return replace(surface, sent={"update": 2 * (devices - 1) / devices * held["gradients"]})


def sharded(surface: Surface, found: Inventory) -> Surface:
    """The surface of one device of several under FSDP2."""
    phases = {
        phase: tuple(_cut(moment, found, phase.rpartition(": ")[2]) for moment in moments)
        for phase, moments in surface.phases.items()
    }
    work = dict(surface.work)
    if "update" in work:
        none, one = work["update"]
        work["update"] = (_scaled(none, found), _scaled(one, found))
    # Forward and backward put everything together, but for the root, which is still there in backward.
    gathered = 2 * (found.weights[1] + found.adapter[1]) - found.root / found.devices
    sent = {"forward+backward": (found.devices - 1) * (gathered + found.trained[1])}
    return replace(surface, phases=phases, work=work, sent=sent)


def _cut(moment: Moment, found: Inventory, phase: str) -> Moment:
    share = {"gradients": found.share, "optimizer": found.share}
    if phase in ("update", "checkpoint"):
        share["temporaries"] = found.share  # of the optimizer: as large as what it updates
    scales = [share.get(kind, 1.0) for kind in KINDS]
    moment = replace(
        moment,
        fixed=tuple(size * scale for size, scale in zip(moment.fixed, scales, strict=True)),
        each=tuple(size * scale for size, scale in zip(moment.each, scales, strict=True)),
    )
    for kind, (whole, own) in (("weights", found.weights), ("adapter", found.adapter)):
        moment = _more(moment, kind, own - whole)
    return _more(moment, "temporaries", _gathered(found, phase))


def _gathered(found: Inventory, phase: str) -> int:
    """What is put together at the peak of a phase, at most.

    The root is until backward ends (it is not resharded after forward); so is the layer at work, and the next one is
    being gathered into a buffer. Backward makes the whole gradients of a layer while those of the layer before it are
    still in the buffer that they are reduced from; those of the root wait until the end.
    """
    if phase == "loading":
        return max(found.root, found.layer)
    if phase not in ("forward+backward", "evaluation"):
        return 0
    gradients = found.root_trained + 2 * found.layer_trained if phase == "forward+backward" else 0
    return found.root + 2 * found.layer + gradients


def _more(moment: Moment, kind: str, size: int) -> Moment:
    place = KINDS.index(kind)
    return replace(moment, fixed=tuple(each + size * (i == place) for i, each in enumerate(moment.fixed)))


def _scaled(work: Mapping[str, Work], found: Inventory) -> dict[str, Work]:
    """Of a share less is computed and moved, by fewer calls where an optimizer works on a chunk after the other."""
    fewer, share = found.chunks[1] / max(1.0, found.chunks[0]), found.share
    return {
        kind: Work(round(each.calls * fewer), round(each.flops * share), round(each.bytes * share))
        for kind, each in work.items()
    }
