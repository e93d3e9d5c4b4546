"""The same method of HF PEFT on the same tiny model: the oracle of what both have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from edgepeft import adapter, step
from edgepeft.backbone import Backbone
from edgepeft.methods.base import Method


def compare(family: str, made: Backbone, method: Method, config: PeftConfig, theirs_of: Callable[[str], str]) -> Any:
    """Logits, gradients and merged weights are those of PEFT's model, once its parameters are ours.

    Args:
        theirs_of: the name that PEFT has for one of our trained tensors, below ``base_model.model``.

    Returns:
        PEFT's model, before it is merged.
    """
    ours = made.model.double()  # as a gradient of one number is a sum that may cancel
    trained = adapter.trained(ours)
    for name in made.fresh:
        ours.get_parameter(name).requires_grad_(False)
        del trained[name]
    tiny.randomise(nn.ParameterList(trained.values()))
    theirs = get_peft_model(tiny.model(family), config).double().eval()
    state = dict(theirs.named_parameters())
    names = {name: f"base_model.model.{theirs_of(name)}" for name in trained}
    assert {name for name, parameter in state.items() if parameter.requires_grad} == set(names.values())
    with torch.no_grad():
        for name, parameter in trained.items():
            state[names[name]].copy_(parameter.view_as(state[names[name]]))
    inputs = step.inputs(tiny.batch(family))
    logits = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    ours(**inputs).logits.backward(upstream)
    # Some gradients are zero but for rounding: of what a softmax or a norm takes away again.
    rounding = 1e-8 * max(parameter.grad.abs().max() for parameter in state.values() if parameter.grad is not None)
    for name, parameter in trained.items():
        expected = state[names[name]].grad
        assert parameter.grad is not None and expected is not None
        assert expected.any() or expected.numel() == 1  # one number for all of a row, which a norm takes away again
        difference = (parameter.grad - expected.view_as(parameter)).abs().max()
        assert difference < 1e-4 * expected.abs().max() + rounding, name
    plain = [name for name, module in tiny.load(family).model.named_modules() if type(module) is nn.Linear]
    method.merge(ours)
    merged = theirs.merge_and_unload()
    for name in plain:
        found, other = ours.get_submodule(name), merged.get_submodule(name)
        for leaf, value in found.named_parameters():
            expected = other.get_parameter(leaf)
            transposed = type(other).__name__ == "Conv1D" and leaf == "weight"
            torch.testing.assert_close(value, expected.t() if transposed else expected, rtol=1e-4, atol=1e-5)
    return theirs
