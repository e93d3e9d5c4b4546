"""GLoRA is HF PEFT's GLoRA, in every form of its five parts."""

from __future__ import annotations

import peft_twin
import pytest
import tiny
import torch
from peft import GloraConfig
from torch import nn

from edgepeft.anatomy import ROLES
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.methods.glora import Generalised
from edgepeft.placements import delta

THEIRS = {"lowrank": "lora", "vector": "vector", "scalar": "constant", "none": "none"}
LEAVES = {"down": "Xd", "up": "Xu", "value": "X"}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    ("ab", "c", "de"),
    [("lowrank", "lowrank", "vector"), ("vector", "vector", "scalar"), ("scalar", "none", "none")],
)
def test_logits_gradients_and_merged_weights_are_those_of_peft(family: str, ab: str, c: str, de: str) -> None:
    made, method = tiny.adapted(family, "glora", rank=3, a=ab, b=ab, c=c, d=de, e=de)
    config = GloraConfig(
        r=3,
        target_modules=made.anatomy.linears(ROLES),
        config_A_B=THEIRS[ab],  # type: ignore[arg-type]
        config_C=THEIRS[c],  # type: ignore[arg-type]
        config_D_E=THEIRS[de],  # type: ignore[arg-type]
    )

    def theirs_of(name: str) -> str:
        path, _, leaf = name.partition(".delta.")
        part, _, kind = leaf.partition(".")
        return f"{path}.glora_{part.upper()}.default.{LEAVES[kind]}"

    peft_twin.compare(family, made, method, config, theirs_of)


@pytest.mark.parametrize("a", ["lowrank", "vector", "scalar", "none"])
@pytest.mark.parametrize("b", ["lowrank", "vector", "scalar", "none"])
@pytest.mark.parametrize("c", ["lowrank", "vector", "scalar", "none"])
def test_any_choice_of_forms_is_the_dense_formula(a: str, b: str, c: str) -> None:
    """y = x (W + W ∘ A + B)ᵀ + b + b ∘ D + E + W C, in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 6, dtype=torch.float64)
    change = Generalised(linear, {"a": a, "b": b, "c": c, "d": "vector", "e": "scalar"}, rank=2).double()
    tiny.randomise(change)
    part = {name: module() for name, module in change.named_children()}
    zero = torch.zeros(1, 1, dtype=torch.float64)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    dense = weight + weight * part.get("a", zero) + part.get("b", zero)
    moved = (weight @ part.get("c", zero).expand(10, 1)).flatten()
    shifted = bias + bias * part["d"].flatten() + part["e"].flatten() + moved
    x = torch.randn(5, 10, dtype=torch.float64)
    delta.attach(linear, change)
    torch.testing.assert_close(linear(x), x @ dense.t() + shifted, rtol=1e-5, atol=1e-5)
    model = nn.Sequential(linear)
    delta.fold(model)
    torch.testing.assert_close(linear.weight, dense.expand(6, 10))
    torch.testing.assert_close(linear.bias, shifted)


def test_without_biases_there_is_nothing_for_c_d_and_e() -> None:
    made, _ = tiny.adapted("llama", "glora")
    found = {n.split(".delta.")[1][0] for n, p in made.model.named_parameters() if p.requires_grad and ".delta." in n}
    assert found == {"a", "b"}


@pytest.mark.parametrize(
    "options", [{"a": "dense"}, {"d": "lowrank"}, {"a": "none", "b": "none"}, {"rank": 0}], ids=str
)
def test_forms_that_do_not_exist(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="glora cannot work with"):
        base.create("glora", options)
