"""Which weights of a SparseAdapter exist, and that the others cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conformance import stages, train
from torch.nn import functional as F

from edgepeft import adapter, step
from edgepeft.methods import base
from edgepeft.placements.projection import Projection
from edgepeft.placements.pruned import Pruned


def parts(model: torch.nn.Module) -> dict[str, Pruned]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Pruned)}


def test_snip_keeps_the_weights_whose_loss_would_be_missed_most() -> None:
    """Sensitivities by finite differences in float64: what scaling one weight does to the loss."""
    made, method = tiny.load("bert"), tiny.method("sparse_adapter", reduction=16)
    base.apply(method, made)
    batch = tiny.batch("bert")
    first, second = method.stages()
    assert first.updates == 1
    dense = {name: module for name, module in made.model.named_modules() if isinstance(module, Projection)}
    tiny.randomise(torch.nn.ParameterList(module.weight for module in dense.values()))
    before = {name: module.weight.detach().clone() for name, module in dense.items()}
    train(made.model, method, first, batch, 1)
    assert all(torch.equal(module.weight, before[name]) for name, module in dense.items()), "it only looks"

    made.model.double()
    name, module = list(dense.items())[1]
    rates = torch.zeros(module.weight.numel(), dtype=torch.float64)
    flat = module.weight.detach().view(-1)
    for index in range(len(flat)):
        kept, around = flat[index].item(), []
        for factor in (1 + 1e-4, 1 - 1e-4):
            flat[index] = kept * factor
            with torch.no_grad():
                around.append(F.cross_entropy(made.model(**step.inputs(batch)).logits, batch["labels"]))
        flat[index] = kept
        rates[index] = (around[0] - around[1]).abs() / 2e-4
    made.model.float()
    found = module.get_buffer("sensitivity").flatten().double()  # of clipped gradients, all smaller by one factor
    torch.testing.assert_close(found / found.max(), rates / rates.max(), rtol=1e-3, atol=1e-5)

    base.begin(method, made, 1)
    pruned = parts(made.model)[name]
    count = round(0.25 * len(rates))
    assert set(pruned.places.tolist()) == set(rates.topk(count).indices.tolist())
    weight, bias = pruned.made()
    assert torch.equal(weight.flatten()[pruned.places.long()], before[name].flatten()[pruned.places.long()])
    assert int((weight != 0).sum()) == count and bias is module.bias
    assert second.updates is None


def test_magnitude_keeps_the_largest_and_random_any() -> None:
    kept = {}
    for score in ("magnitude", "random"):
        made = tiny.load("bert")
        method = tiny.method("sparse_adapter", score=score)
        assert len(method.stages()) == 1
        torch.manual_seed(7)
        base.apply(method, made)
        kept[score] = parts(made.model)
    torch.manual_seed(7)
    made = tiny.load("bert")
    torch.manual_seed(7)
    base.apply(tiny.method("houlsby", reduction=4), made)
    for name, pruned in kept["magnitude"].items():
        dense = made.model.get_submodule(name)
        assert isinstance(dense, Projection)
        largest = dense.weight.abs().flatten().topk(len(pruned.places)).indices
        assert set(pruned.places.tolist()) == set(largest.tolist())
    same = [torch.equal(pruned.places, kept["magnitude"][name].places) for name, pruned in kept["random"].items()]
    assert not any(same)


@pytest.mark.parametrize("score", ["snip", "magnitude", "random"])
def test_only_what_exists_is_trained_and_stored(score: str, tmp_path: Path) -> None:
    """As many weights as Houlsby's adapters of a quarter of the width."""
    made, method = tiny.adapted("llama", "sparse_adapter", score=score)
    trained = sum(p.numel() for p in adapter.trained(made.model).values())
    assert trained == 4 * (2 * 32 * 8 // 4 + 8 + 32)
    card = adapter.card(method, model="m", task=made.task, precision="fp32", labels=None, seed=0)
    adapter.save(tmp_path / "adapter", made.model, card)
    stored = adapter.read_tensors(tmp_path / "adapter" / adapter.TENSORS)
    assert sum(t.numel() for t in stored.values() if t.is_floating_point()) == trained
    assert {t.dtype for name, t in stored.items() if name.endswith("places")} == {torch.int32}


def test_what_was_pruned_stays_zero() -> None:
    *_, (made, method, stage) = stages("bert", "sparse_adapter")
    before = {name: (pruned.made()[0] == 0) for name, pruned in parts(made.model).items()}
    train(made.model, method, stage, tiny.batch("bert"), 5)
    for name, pruned in parts(made.model).items():
        weight = pruned.made()[0]
        assert not weight[before[name]].any() and weight.any()
