"""Which variant goes to the device, and what the ledger says of those that do not."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import training
from tiny_tokenizers import CHATML, byte_level, unigram
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from edgepeft import deploy, ledger, pipeline, recipe
from edgepeft.data import load
from edgepeft.ledger import Row
from edgepeft.runtime.device import Device


def row(variant: str, size: int, speed: float | None = None, ms: float = 1.0, kept: bool = True) -> Row:
    return Row(artefact=f"onnx-{variant}", bytes=size, tokens_per_second=speed, latency_ms=ms, kept=kept)


@pytest.mark.parametrize(
    ("fp32", "int8", "best"),
    [
        (row("fp32", 9, 100.0), row("int8", 3, 150.0), "int8"),
        (row("fp32", 9, 100.0), row("int8", 3, 95.0), "int8"),  # which may be chance
        (row("fp32", 9, 100.0), row("int8", 3, 60.0), "fp32"),
        (row("fp32", 9, ms=1.0), row("int8", 3, ms=1.1), "int8"),  # a classifier
        (row("fp32", 9, ms=1.0), row("int8", 3, ms=2.0), "fp32"),
        (row("fp32", 9, 100.0), row("int8", 3, 150.0, kept=False), "fp32"),  # it lost the fine-tune
    ],
)
def test_the_smallest_that_is_not_clearly_slower_is_chosen(fp32: Row, int8: Row, best: str) -> None:
    rows = {"fp32": fp32, "int8": int8}
    assert deploy.choose(rows) == best
    said = deploy._marked(int8, fp32, best).note
    assert ("On the device." == said) == (best == "int8")
    if best == "fp32" and int8.kept:
        assert "slower here than fp32" in said and "against" in said


def test_rows_of_artefacts_that_are_no_more_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    ledger.record(path, Row(artefact="base"), row("int8", 3), row("fp32", 9))
    ledger.drop(path, {"onnx-int8", "onnx-int4"})
    assert [each.artefact for each in ledger.read(path)] == ["base", "onnx-fp32"]


@pytest.mark.parametrize("method", ["lst", "houlsby", "prompt_tuning"])
def test_variants_are_made_without_the_model_in_memory(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 in fp32 stayed beside the quantised graph's session, a quarter of all that a run took."""
    models: list[weakref.ref[Any]] = []
    whole, quantized = pipeline._Job._whole, deploy.quantize.quantize

    def loaded(job: Any) -> Any:
        made = whole(job)
        models.append(weakref.ref(made))
        return made

    def quantize(*arguments: Any) -> Any:
        assert models and models[0]() is None
        return quantized(*arguments)

    monkeypatch.setattr(pipeline._Job, "_whole", loaded)
    monkeypatch.setattr(deploy.quantize, "quantize", quantize)
    options = (
        {"options": {"reduction": 4}} if method == "lst" else {"options": {"length": 2}} if "prompt" in method else {}
    )
    chosen = training.written("causal-lm", method=method, max_steps=1, variants=["int8"], **{"options": {}, **options})
    gc.disable()
    try:
        pipeline.run(chosen, tmp_path / "run")
    finally:
        gc.enable()
    assert models


def _deployed(home: Path, tokens: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> tuple[Device, list[int]]:
    """The device folder of a short run, and the first prompt's tokens as training had them."""
    changes = {"vocab_size": len(tokens), "eos_token_id": 7}  # the configuration's is not the tokenizer's
    _run(home, tiny.model("llama", **changes), tokens, rows)
    data = home / "data.jsonl"
    read = load(str(data), validation=str(data), tokenizer=tokens, cache=home / "c", max_tokens=64)
    return Device.load(home / "run" / "device", threads=1), read.train.examples([0])[0].prompt_ids


def _run(home: Path, model: Any, tokens: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    """A short run in the folder ``run``, up to the device."""
    model.save_pretrained(home / "model")
    tokens.save_pretrained(home / "model")
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"model": str(home / "model"), "data": str(home / "data.jsonl"), "method": "ia3", "precision": "fp32"}
    chosen = recipe.create({**values, "microbatch": 2, "max_steps": 1, "variants": [], "max_tokens": 64})
    pipeline.run(chosen, home / "run")


ROWS = [("the fox", " a dog"), ("a small board", " it runs"), ("Paris", " France"), ("the lazy dog", " jumps")]


def test_a_device_reads_prompts_and_ends_answers_as_training_did(tmp_path: Path) -> None:
    """A tokenizer that closes every text with eos, of which the model's configuration names another."""
    tokens = byte_level()
    closed = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokens.eos_token_id)])
    tokens.backend_tokenizer.post_processor = closed
    device, asked = _deployed(tmp_path, tokens, [{"prompt": p, "completion": c} for p, c in ROWS])
    assert tokens(ROWS[0][0])["input_ids"] == [*asked, tokens.eos_token_id]
    assert device.encode(ROWS[0][0]) == asked
    assert set(device.manifest.eos_token_ids) == {7, tokens.eos_token_id}
    assert device.manifest.stop is None


def test_a_t5_that_does_not_say_what_its_decoder_begins_with_begins_with_padding(tmp_path: Path) -> None:
    """transformers' own configuration of a T5 has no such field where its config.json has none."""
    tokens = unigram()
    made = tiny.model("t5", vocab_size=len(tokens), pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    del made.config.decoder_start_token_id
    made.generation_config.decoder_start_token_id = None
    _run(tmp_path, made, tokens, [{"input": p, "target": c} for p, c in ROWS])
    assert "decoder_start_token_id" not in json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    device = Device.load(tmp_path / "run" / "device", threads=1)
    assert device.manifest.decoder_start_token_id == tokens.pad_token_id


def test_a_device_stops_at_the_marker_that_ends_a_turn(tmp_path: Path) -> None:
    """One that is several tokens, as that of a base model that was given a chat template."""
    tokens = byte_level(chat_template=CHATML.replace("<|im_end|>", "</turn>"))
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": c.strip()}] for p, c in ROWS]
    device, asked = _deployed(tmp_path, tokens, [{"messages": turn} for turn in turns])
    assert device.encode(ROWS[0][0]) == asked
    assert device.manifest.stop == ["</turn>"] and tokens.eos_token_id in device.manifest.eos_token_ids
    letters = iter(tokens("yes</turn>yes", add_special_tokens=False)["input_ids"])
    with mock.patch("edgepeft.runtime.decode.generate", lambda *_: (np.array([token]) for token in letters)):
        assert "".join(device.generate("say yes")) == "yes"
