"""LoftQ: closer to the original weights than packing alone, the same after loading again, and merged into its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from edgepeft import adapter, backbone, precision, step
from edgepeft.errors import UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.merge import merge
from edgepeft.methods import base
from edgepeft.methods.base import Method
from edgepeft.methods.lora import LowRank
from edgepeft.placements import loftq
from edgepeft.trace import fake_device

PACKED = ("nf4", "int8")


def load(family: str, at: str, **options: object) -> tuple[backbone.Backbone, Method]:
    method = tiny.method("lora", **{"rank": 8, "loftq": 3, **options})
    labels = ["a", "b", "c"] if tiny.task(family) == "classification" else None
    source = backbone.resolve(str(tiny.folder(family)))
    return backbone.load(source, task=tiny.task(family), at=at, labels=labels, pack=method.pack), method


@pytest.mark.parametrize("at", PACKED)
def test_it_is_the_algorithm_of_the_paper(at: str) -> None:
    """Algorithm 1 with dense matrices in float64: no other product of that rank repairs the packed weight better."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    weight = linear.weight.detach().double()
    errors = []
    for times in (1, 2, 5):
        packed, a, b = loftq.alternate(linear, at, 8, times)
        lost = weight - packed.dequantize(torch.float32).double()
        left, values, right = torch.linalg.svd(lost)
        best = left[:, :8] @ values[:8].diag() @ right[:8]
        torch.testing.assert_close((b @ a).double(), best, rtol=1e-3, atol=1e-5)
        errors.append((lost - best).norm())
        again = loftq.alternate(linear, at, 8, times)
        assert torch.equal(again[0].dequantize(torch.float32), packed.dequantize(torch.float32))
        assert torch.equal(again[1], a) and torch.equal(again[2], b)
    plain = (weight - precision.pack(linear, at).dequantize(torch.float32).double()).norm()
    assert errors[0] < 0.95 * plain and errors[2] < errors[0]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_training_starts_closer_to_the_original_than_packing_alone(family: str) -> None:
    batch = tiny.batch(family)
    original = sample_logits(tiny.load(family).model, [batch])[0]
    packed = sample_logits(tiny.load(family, "nf4").model, [batch])[0]
    made, method = load(family, "nf4")
    base.apply(method, made)
    assert not [m for m in made.model.modules() if "start" in vars(m)], "the factors are the delta's alone"
    repaired = sample_logits(made.model.eval(), [batch])[0]
    if family == "bert":  # the pooler and head are not packed, and the head is new
        assert (repaired - original).norm() < (packed - original).norm()
    else:
        assert (repaired - original).norm() < 0.8 * (packed - original).norm()


def test_layers_without_a_change_are_packed_as_ever() -> None:
    made, method = load("llama", "nf4", targets=("query", "value"))
    base.apply(method, made)
    plain = tiny.load("llama", "nf4").model
    for name in made.anatomy.linears(("query", "key", "value", "ffn_in")):
        ours, theirs = made.model.get_submodule(name), plain.get_submodule(name)
        changed = any(isinstance(child, LowRank) for child in ours.children())
        assert torch.equal(ours.packed, theirs.packed) != changed, name


def test_a_saved_adapter_finds_the_same_packed_weights_and_merges_into_those_alone(tmp_path: Path) -> None:
    made, method = load("llama", "nf4")
    base.apply(method, made)
    batch = tiny.batch("llama")
    trainer = step.TrainingStep(made.model, method.optimizer(made.model, 1e-3, 0.0), clip_norm=1.0)
    for _ in range(3):
        trainer.backward([batch], 1e-3)
        trainer.update()
    card = adapter.card(method, model="m", task=made.task, precision="nf4", labels=None, seed=0)
    adapter.save(tmp_path / "adapter", made.model, card)
    again, same = load("llama", "nf4")
    base.complete(same, again)
    adapter.load(tmp_path / "adapter", again.model)
    assert torch.equal(sample_logits(made.model.eval(), [batch])[0], sample_logits(again.model.eval(), [batch])[0])

    class Unsaved:
        def save_pretrained(self, folder: Path) -> None: ...

    asked = []

    def trained(at: str) -> backbone.Backbone:
        asked.append(at)
        return again

    folder, held = tmp_path / "merged", dict[str, int]()
    rows = merge(trained, "nf4", same, batches=[batch], tokenizer=Unsaved(), out=folder, phases=held)
    assert asked == ["nf4"], "its adapter does not fit the original weights"
    assert [row.artefact for row in rows] == ["merged-nf4", "merged-dequantised"] and rows[-1].kept
    merged = backbone.load(backbone.resolve(str(tmp_path / "merged")), task="causal-lm", at="fp32")
    found, expected = sample_logits(merged.model, [batch])[0], sample_logits(made.model, [batch])[0]
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("at", PACKED)
def test_it_can_be_planned(at: str) -> None:
    """On fake tensors: the same layers of the same sizes, and nothing else."""
    method = tiny.method("lora", loftq=2)

    def tensors(pack: backbone.Packing | None) -> dict[str, tuple[torch.Size, torch.dtype]]:
        with fake_device(cuda=True):
            made = backbone.skeleton(tiny.configuration("llama"), task="causal-lm", at=at, pack=pack)
            base.apply(method, made)
            return {name: (value.shape, value.dtype) for name, value in made.model.state_dict().items()}

    assert tensors(method.pack) == tensors(None)


def test_a_layer_may_be_too_small_for_the_rank() -> None:
    """The repair of keys and values, of width 16, takes what of the rank it can."""
    made, method = load("llama", "nf4", rank=24)
    base.apply(method, made)
    low = made.model.get_submodule(made.anatomy.blocks[0].linears["key"][0]).get_submodule("delta")
    assert isinstance(low, LowRank) and low.b[:, :16].any() and not low.b[:, 16:].any()


def test_unpacked_weights_have_lost_nothing() -> None:
    made, method = load("llama", "fp32")
    with pytest.raises(UsageError, match="cannot train on fp32 weights"):
        base.apply(method, made)
