"""Adapter files: what was trained and nothing else, and never on the wrong model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgepeft import adapter
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.evaluate import sample_logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made, method = tiny.adapted("bert", "lora", rank=2)
    tiny.randomise(nn.ParameterList(adapter.trained(made.model).values()))
    card = adapter.card(method, model="m", task="classification", precision="fp32", labels=("a", "b", "c"), seed=3)
    adapter.save(tmp_path / "adapter", made.model, card)
    return tmp_path / "adapter"


def test_only_what_was_trained_is_stored(saved: Path) -> None:
    made, _ = tiny.adapted("bert", "lora", rank=2)
    stored = load_file(saved / adapter.TENSORS)
    assert stored.keys() == adapter.trained(made.model).keys()
    assert {name for name in stored if ".delta." not in name} == {"classifier.weight", "classifier.bias"}


def test_the_card_says_what_it_belongs_to(saved: Path) -> None:
    card = adapter.read_card(saved)
    assert (card.method, card.model, card.task, card.precision, card.seed) == ("lora", "m", "classification", "fp32", 3)
    assert card.labels == ("a", "b", "c")
    assert tiny.method(card.method, **card.options) == tiny.method("lora", rank=2)


@pytest.mark.parametrize("at", ["bf16", "nf4"])
def test_an_adapter_moves_between_precisions(saved: Path, at: str) -> None:
    batch = tiny.batch("bert")
    full, _ = tiny.adapted("bert", "lora", rank=2)
    adapter.load(saved, full.model)
    made, _ = tiny.adapted("bert", "lora", at, rank=2)
    before = sample_logits(made.model, [batch])[0]
    adapter.load(saved, made.model)
    expected = sample_logits(full.model, [batch])[0]
    after = sample_logits(made.model, [batch])[0]
    assert (after - expected).norm() < 0.5 * (before - expected).norm()


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("lora", {"rank": 3}, "tensors of another shape"),
        ("lora", {"rank": 2, "targets": ("query",)}, "20 tensors not in the model"),
        ("ln_tuning", {}, "10 tensors missing"),
    ],
)
def test_an_adapter_of_something_else(saved: Path, name: str, options: dict[str, Any], part: str) -> None:
    made, _ = tiny.adapted("bert", name, **options)
    before = {n: p.detach().clone() for n, p in adapter.trained(made.model).items()}
    with pytest.raises(UsageError, match="does not belong to this model") as caught:
        adapter.load(saved, made.model)
    assert part in caught.value.cause
    assert all(torch.equal(p, before[n]) for n, p in adapter.trained(made.model).items())


@pytest.mark.parametrize(
    ("method", "model", "changed", "part"),
    [
        ("lora", "other", {}, "It was trained on m, and this is other."),
        ("dora", "m", {}, "It is one of lora, and this is dora."),
        ("lora", "m", {"rank": 4}, "with rank = 4, by edgepeft"),
        ("lora", "m", {"spectral": True}, "this lora has no such option"),
    ],
)
def test_an_adapter_of_another_backbone_or_version_is_refused(
    saved: Path, method: str, model: str, changed: dict[str, Any], part: str
) -> None:
    wanted = tiny.method(method, rank=2)
    card = json.loads((saved / adapter.CARD).read_text())
    (saved / adapter.CARD).write_text(json.dumps({**card, "options": {**card["options"], **changed}}))
    with pytest.raises(UsageError, match="does not belong to this run") as caught:
        adapter.check(saved, wanted, model)
    assert part in caught.value.cause and caught.value.remedy


def test_a_backbone_is_known_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it lies and whatever lies beside them; where nothing is known of them, by its name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder("llama"), "here")
    method = tiny.method("lora", rank=2)
    card = adapter.card(method, model="here", task="causal-lm", precision="fp32", labels=None, seed=0)
    assert card.weights
    adapter.save(tmp_path / "adapter", tiny.adapted("llama", "lora", rank=2)[0].model, card)
    Path("here").rename("there")
    Path("there/README.md").write_text("moved")
    for model in ("there", "./there", str(tmp_path / "there")):
        adapter.check(tmp_path / "adapter", method, model)
    shutil.copytree(tiny.folder("qwen3"), "here")
    with pytest.raises(UsageError, match="does not belong to this run") as caught:
        adapter.check(tmp_path / "adapter", method, "here")
    assert caught.value.cause == "It was trained on here, whose weights have changed since."
    older = {**json.loads((tmp_path / "adapter" / adapter.CARD).read_text()), "weights": ""}
    (tmp_path / "adapter" / adapter.CARD).write_text(json.dumps(older))
    adapter.check(tmp_path / "adapter", method, "./here")
    with pytest.raises(UsageError, match="does not belong to this run"):
        adapter.check(tmp_path / "adapter", method, "there")


def test_an_adapter_of_another_version_of_its_method_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cards had no version: they are of the first."""
    method = tiny.method("lora", rank=2)
    card = json.loads((saved / adapter.CARD).read_text())
    assert card.pop("version") == 1
    (saved / adapter.CARD).write_text(json.dumps(card))
    adapter.check(saved, method, "m")
    monkeypatch.setattr(type(method), "version", 2)
    with pytest.raises(UsageError, match="does not belong to this run") as caught:
        adapter.check(saved, method, "m")
    assert "version 1 of lora" in caught.value.cause and caught.value.remedy.startswith("Train again")
    (saved / adapter.CARD).write_text(json.dumps({**card, "edgepeft": "0.0.1"}))
    with pytest.raises(UsageError) as caught:
        adapter.check(saved, method, "m")
    assert caught.value.remedy.startswith("Use edgepeft 0.0.1 for it, or train again")


def test_a_card_that_says_more_than_this_version_knows_is_of_another_one(saved: Path) -> None:
    card = json.loads((saved / adapter.CARD).read_text())
    (saved / adapter.CARD).write_text(json.dumps({**card, "edgepeft": "9.1", "revision": "main"}))
    with pytest.raises(UsageError, match="of another version") as caught:
        adapter.read_card(saved)
    assert "'revision'" in caught.value.cause and "9.1" in caught.value.cause and caught.value.remedy


@pytest.mark.parametrize(
    ("changed", "part"),
    [({"options": []}, "'options' is \\[\\]"), ({"labels": "ab"}, "'labels' is 'ab'"), ({"seed": None}, "'seed'")],
)
def test_a_card_of_other_types_is_damaged(saved: Path, changed: dict[str, Any], part: str) -> None:
    card = json.loads((saved / adapter.CARD).read_text())
    for content in (json.dumps({**card, **changed}), json.dumps([card])):
        (saved / adapter.CARD).write_text(content)
        with pytest.raises(EdgePeftError, match=rf"is damaged[\s\S]*({part}|no JSON object)") as caught:
            adapter.read_card(saved)
        assert not isinstance(caught.value, UsageError)


def test_an_adapter_from_before_an_option_is_one_with_its_default(saved: Path) -> None:
    card = json.loads((saved / adapter.CARD).read_text())
    (saved / adapter.CARD).write_text(json.dumps({**card, "options": {"rank": 2}}))
    adapter.check(saved, tiny.method("lora", rank=2), "m")
    with pytest.raises(UsageError, match="does not belong"):
        adapter.check(saved, tiny.method("lora", rank=2, ratio=16.0), "m")


def test_damaged_and_missing_files(saved: Path, tmp_path: Path) -> None:
    made, _ = tiny.adapted("bert", "lora", rank=2)
    content = (saved / adapter.TENSORS).read_bytes()
    (saved / adapter.TENSORS).write_bytes(content[:-7])
    with pytest.raises(EdgePeftError, match="cannot be read"):
        adapter.load(saved, made.model)
    (saved / adapter.CARD).write_text('{"method": ')
    with pytest.raises(EdgePeftError, match="is damaged"):
        adapter.read_card(saved)
    (saved / adapter.CARD).write_text(json.dumps({"method": "lora", "labels": None}))
    with pytest.raises(EdgePeftError, match="is damaged"):
        adapter.read_card(saved)
    with pytest.raises(UsageError, match="There is no adapter"):
        adapter.read_card(tmp_path)
    with pytest.raises(EdgePeftError, match="cannot be read"):
        adapter.load(tmp_path, made.model)


def test_saving_replaces_the_whole_folder(saved: Path) -> None:
    (saved / "stale.txt").touch()
    made, method = tiny.adapted("bert", "lora", rank=2)
    card = adapter.card(method, model="m", task="classification", precision="fp32", labels=None, seed=0)
    adapter.save(saved, made.model, card)
    assert {path.name for path in saved.iterdir()} == {adapter.TENSORS, adapter.CARD}
    assert adapter.read_card(saved).labels is None


def test_equal_adapters_are_equal_bytes(saved: Path, tmp_path: Path) -> None:
    made, method = tiny.adapted("bert", "lora", rank=2)
    adapter.load(saved, made.model)
    adapter.save(tmp_path / "again", made.model, adapter.read_card(saved))
    for name in (adapter.TENSORS, adapter.CARD):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_other_tensors_of_a_file_are_not_taken(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    adapter.copy_into({"a": parameter}, adapter.read_tensors(tmp_path / "x.safetensors"), "x")
    assert torch.equal(parameter, torch.ones(2))
