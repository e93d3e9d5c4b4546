"""Attention Fusion and LeTS: what is done at the end of the stack, and that nothing goes back through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from edgepeft import adapter, backbone, step
from edgepeft.backbone import Backbone
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.methods.attention_fusion import Fusion
from edgepeft.methods.lets import Differences
from edgepeft.placements.late import Late
from edgepeft.placements.projection import Projection
from edgepeft.placements.pruned import Pruned

FAMILIES = ("bert", "distilbert", "llama", "gemma2", "gpt2", "t5")
CLASSIFIERS = FAMILIES[:2]


def late_of(made: Backbone) -> tuple[Any, nn.Module]:
    """The module at the end of the last stack, and the one it hangs on."""
    (path,) = [name for name, module in made.model.named_modules() if isinstance(module, Late)]
    return made.model.get_submodule(path), made.model.get_submodule(path.removesuffix(".late.late"))


def run(made: Backbone, family: str) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Layers' outputs, what attention's output projections read, and the end of the last stack before and after."""
    last = [block for block in made.anatomy.blocks if block.stack == len(made.anatomy.stacks) - 1]
    outputs: list[Tensor] = []
    reads: list[Tensor] = []
    ends: list[Tensor] = []
    module, _ = late_of(made)
    for block in last:
        made.model.get_submodule(block.path).register_forward_hook(
            lambda m, i, out: outputs.append(out if isinstance(out, Tensor) else out[0])
        )
        made.model.get_submodule(block.linears["output"][0]).register_forward_hook(lambda m, i, out: reads.append(i[0]))
    module.register_forward_hook(lambda m, i, out: ends.extend((i[0], out)))
    made.model(**step.inputs(tiny.batch(family)))
    return outputs, reads, ends[0], ends[1]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_fusion_is_attention_over_the_layers(family: str) -> None:
    made, _ = tiny.adapted(family, "attention_fusion", last=0.7)
    fusion, _ = late_of(made)
    assert isinstance(fusion, Fusion) and adapter.trained(made.model).keys() - made.fresh
    states, _, end, fused = run(made, family)
    torch.testing.assert_close(end, states[-1], rtol=0, atol=0)
    torch.testing.assert_close(fused, 0.3 * states[0] + 0.7 * states[1], rtol=1e-5, atol=1e-5)

    made, _ = tiny.adapted(family, "attention_fusion", last=0.7)
    fusion, _ = late_of(made)
    nn.init.normal_(fusion.query, std=0.3)
    states, _, _, fused = run(made, family)
    stacked = torch.stack(states).double()
    keys = stacked / stacked.square().mean(-1, keepdim=True).sqrt()
    scores = keys @ fusion.query.double() + torch.tensor([0.3, 0.7]).double().log()[:, None, None]
    expected = (scores.softmax(0).unsqueeze(-1) * stacked).sum(0)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_differences_read_the_fixed_backbone_and_are_added_at_the_end(family: str) -> None:
    made = tiny.load(family)
    method = tiny.method("lets")
    base.apply(method, made)
    differences, _ = late_of(made)
    assert isinstance(differences, Differences)
    tiny.randomise(differences)
    for number in range(2):
        if number:
            base.begin(method, made, 1)
        _, reads, end, changed = run(made, family)
        expected = end.double()
        for layer, x in zip(differences.layers, reads, strict=True):
            assert isinstance(layer, Projection | Pruned)
            weight = layer.weight if isinstance(layer, Projection) else layer.made()[0]
            expected = expected + x.double() @ weight.double().T
        torch.testing.assert_close(changed.double(), expected, rtol=1e-4, atol=1e-4)
        assert (changed - end).abs().max() > 0.1


def test_the_largest_entries_of_each_difference_are_kept() -> None:
    made = tiny.load("bert")
    method = tiny.method("lets", kept=0.1)
    base.apply(method, made)
    differences, _ = late_of(made)
    tiny.randomise(differences)
    before = [layer.weight.detach().clone() for layer in differences.layers]
    base.begin(method, made, 1)
    for layer, old in zip(differences.layers, before, strict=True):
        assert isinstance(layer, Pruned) and layer.bias is None
        kept = layer.made()[0]
        assert int((kept != 0).sum()) == len(layer.values) == round(0.1 * 32 * 32)
        assert torch.equal(kept[kept != 0], old[kept != 0])
        assert old[kept == 0].abs().max() <= old[kept != 0].abs().min()
    assert [stage.share for stage in method.stages()] == pytest.approx([0.1, 0.9])


LATE = [("attention_fusion", family) for family in CLASSIFIERS] + [("lets", family) for family in FAMILIES]


@pytest.mark.parametrize("at", ["fp32", "nf4"])
@pytest.mark.parametrize(("name", "family"), LATE)
def test_nothing_goes_back_through_the_layers(family: str, at: str, name: str) -> None:
    made, _ = tiny.adapted(family, name, at)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    graphs: list[str] = []
    for block in made.anatomy.blocks:
        for path, module in made.model.get_submodule(block.path).named_modules(prefix=block.path):
            module.register_forward_hook(
                lambda m, i, out, path=path: graphs.extend(
                    [path] if any(t.requires_grad for t in (*i, out) if isinstance(t, Tensor)) else []
                )
            )
    made.model.train()
    tiny.loss_sum(made.model, tiny.batch(family)).backward()
    assert graphs == []
    late, _ = late_of(made)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in late.parameters())


def test_a_single_layer_has_nothing_to_fuse(tmp_path: Path) -> None:
    tiny.model("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    made = backbone.load(backbone.resolve(str(tmp_path)), task="classification", at="fp32")
    with pytest.raises(UsageError, match="attention_fusion: there is nothing to fuse"):
        base.apply(tiny.method("attention_fusion"), made)


def test_a_decoder_fuses_its_layers_to_classify_and_not_to_generate() -> None:
    made = backbone.load(backbone.resolve(str(tiny.folder("llama"))), task="classification", at="fp32")
    base.apply(tiny.method("attention_fusion"), made)
    assert sum(name.endswith("late.query") for name in adapter.trained(made.model)) == 1
    for family in ("llama", "t5"):
        with pytest.raises(UsageError, match="cannot teach a model that generates text"):
            base.apply(tiny.method("attention_fusion"), tiny.load(family))
