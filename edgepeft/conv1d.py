"""GPT-2 keeps its linear layers transposed (``Conv1D``); here they are ``nn.Linear``, so that methods see one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from edgepeft import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linearize(model: nn.Module) -> None:
    """Put an ``nn.Linear`` in place of every ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    for name, module in precision.one_by_one(model, lambda module: isinstance(module, Conv1D)):
        with torch.device("meta"):
            linear = nn.Linear(module.nx, module.nf)
        linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
        linear.bias = module.bias
        model.set_submodule(name, linear)


def transposed(model: PreTrainedModel) -> set[str]:
    """The linear layers that the architecture keeps transposed, which ``linearize`` turned round."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        original = type(model)(model.config)
    return {name for name, module in original.named_modules() if isinstance(module, Conv1D)}
