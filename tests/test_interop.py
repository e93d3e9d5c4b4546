"""HF PEFT computes the same with an adapter that was written for it, and edgepeft with one that PEFT wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from conformance import randomised
from torch import nn

from edgepeft import adapter, interop
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.evaluate import sample_logits
from edgepeft.merge import relative_difference
from edgepeft.methods import base

CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 3, "alpha": 5.0}),
    ("lora", {"rank": 3, "alpha": 5.0, "rank_stabilised": True, "targets": ("query", "value")}),
    ("dora", {"rank": 3, "alpha": 5.0}),
    ("adalora", {"rank": 3, "budget": 2, "alpha": 5.0}),
    ("ln_tuning", {}),
]


def plain(family: str) -> Any:
    loader = {"classification": "SequenceClassification", "causal-lm": "CausalLM", "seq2seq": "Seq2SeqLM"}
    return getattr(transformers, f"AutoModelFor{loader[tiny.task(family)]}").from_pretrained(tiny.folder(family))


def saved(family: str, name: str, options: dict[str, Any], folder: Path) -> list[torch.Tensor]:
    """A randomised adapter of edgepeft's, and the logits it gives."""
    made, method = tiny.adapted(family, name, **options)
    randomised(made.model, seed=7)
    labels = tuple(f"label-{number}" for number in range(tiny.LABELS)) if made.task == "classification" else None
    model = str(tiny.folder(family))
    what = adapter.card(method, model=model, task=made.task, precision="fp32", labels=labels, seed=0)
    adapter.save(folder, made.model, what)
    return sample_logits(made.model.eval(), [tiny.batch(family)])


def inside(wrapped: peft.PeftModel) -> nn.Module:
    """The transformers model that PEFT changed."""
    model = wrapped.base_model.model
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_peft_computes_the_same(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(family, name, options, tmp_path / "ours")
    interop.write(tmp_path / "ours", tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(plain(family), tmp_path / "theirs").eval()
    found = sample_logits(inside(loaded), [tiny.batch(family)])
    assert relative_difference(sample_logits(plain(family).eval(), [tiny.batch(family)]), expected) > 1e-2
    assert relative_difference(expected, found) < 1e-5


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_what_peft_saved_computes_the_same(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    saved(family, name, options, tmp_path / "ours")
    interop.write(tmp_path / "ours", tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(plain(family), tmp_path / "theirs").eval()
    expected = sample_logits(inside(theirs), [tiny.batch(family)])
    theirs.save_pretrained(str(tmp_path / "saved"))
    interop.read(tmp_path / "saved", tmp_path / "back")
    card = adapter.read_card(tmp_path / "back")
    made = tiny.load(family)
    base.complete(base.create(card.method, card.options), made)
    adapter.load(tmp_path / "back", made.model)
    assert relative_difference(expected, sample_logits(made.model.eval(), [tiny.batch(family)])) < 1e-5


def test_what_cannot_be_translated_is_refused(tmp_path: Path) -> None:
    saved("llama", "houlsby", {}, tmp_path / "ours")
    with pytest.raises(UsageError, match="houlsby cannot be written for PEFT"):
        interop.write(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    with pytest.raises(EdgePeftError, match="adapter_config.json cannot be read"):
        interop.read(tmp_path / "ours", tmp_path / "back")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=r".*layers\.0\.self_attn\.q_proj")
    peft.get_peft_model(plain("llama"), config).save_pretrained(str(tmp_path / "partly"))
    with pytest.raises(UsageError, match="all layers of a role"):
        interop.read(tmp_path / "partly", tmp_path / "back")
    config = peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    peft.get_peft_model(plain("llama"), config).save_pretrained(str(tmp_path / "loha"))
    with pytest.raises(UsageError, match="kind LOHA cannot be read"):
        interop.read(tmp_path / "loha", tmp_path / "back")
