"""A model of which each of several devices holds a part: PyTorch's FSDP2, which divides every parameter by its rows.

Every layer is put together from its parts while it is at work, and what is outside of layers from the first forward
pass on until backward ends. ``sharding`` says what that takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from edgepeft.ranks import Ranks

if TYPE_CHECKING:
    from edgepeft.backbone import Backbone


def divide(backbone: Backbone, ranks: Ranks) -> None:
    """Leave this rank's part of every parameter, and all buffers, on its device; nothing is changed of what is not
    ``ranks.sharded``. Gradients are summed over the ranks.

    The model may be in the computer's memory: a layer is moved at a time.
    """
    if not ranks.sharded:
        return
    # Where the head is left out, a model gives a view of its states, and nothing is done to that in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    layers = [backbone.model.get_submodule(block.path) for block in backbone.anatomy.blocks]
    for module in [*layers, backbone.model]:
        divided: Any = fully_shard(module, mesh=mesh)
        divided.set_gradient_divide_factor(1.0)  # the loss is a mean over the targets of all ranks already
        divided.set_force_sum_reduction_for_comms(True)  # and gloo cannot scale what it sums


def is_divided(model: nn.Module) -> bool:
    """Whether its parameters are parts."""
    return isinstance(model, FSDPModule)


def settle(model: nn.Module) -> None:
    """Let go of what is put together, as a forward pass without a backward leaves it: all parameters are parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own(tensor: Tensor) -> Tensor:
    """This rank's part, through which the tensor is written; all of a tensor that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all ranks, which must call this in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, divided as ``like`` is and on its device."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def collected(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copies in the computer's memory, one after the other, on the first rank; the others only lend their parts."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ranks.first or ranks.sharded:
            complete = whole(tensor.detach())
            if ranks.first:
                found[name] = complete.cpu().contiguous()
    return found
