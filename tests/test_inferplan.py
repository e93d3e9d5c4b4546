"""Plans of inference, against what exported graphs weigh and the caches that models make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

from edgepeft import backbone, hardware, inferplan
from edgepeft.cli import app
from edgepeft.errors import UsageError
from edgepeft.export import onnx, quantize

PAGE = 4096  # each tensor of a graph's data begins at a multiple of this


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_weights_are_what_the_exported_graphs_hold(family: str, tmp_path: Path) -> None:
    model, task = wide(family), tiny.task(family)
    onnx.export(model, task, tmp_path / "fp32")
    for precision in inferplan.PRECISIONS:
        if precision != "fp32":
            quantize.quantize(tmp_path / "fp32", precision, task, tmp_path / precision)
        held = sum(path.stat().st_size for path in (tmp_path / precision).glob("*.data"))
        missing = held - inferplan.weights_bytes(model, task, precision)
        assert -0.01 * held < missing < 2 * PAGE * len(list(model.parameters()))  # int8 adds a tensor of scales to each


def wide(family: str) -> Any:
    """Wide enough for the weights to count beside the little that a graph adds."""
    sizes = {"t5": {"d_model": 256, "d_ff": 512}, "bert": {"hidden_size": 256, "intermediate_size": 512}}
    return tiny.model(family, **sizes.get(family, {"hidden_size": 256, "intermediate_size": 512}), vocab_size=2048)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "t5"])
def test_the_cache_is_what_the_model_makes(family: str) -> None:
    model: Any = tiny.model(family)
    tokens = 3  # shorter than gemma2's window
    ids = torch.ones(1, tokens, dtype=torch.long)
    inputs = {"decoder_input_ids": ids} if family == "t5" else {}
    made = model(input_ids=ids, use_cache=True, **inputs).past_key_values
    stacks = (made.self_attention_cache, made.cross_attention_cache) if family == "t5" else (made,)
    held = sum(t.nbytes for stack in stacks for layer in stack.layers for t in (layer.keys, layer.values))
    shaped = backbone_on_meta(family)
    assert inferplan.cache_bytes(shaped, tiny.task(family), tokens) == held


def backbone_on_meta(family: str) -> Any:
    with torch.device("meta"):
        return backbone.skeleton(tiny.configuration(family), task=tiny.task(family), at="fp32").model


def planned(name: str, device: str, tokens: int = 512) -> inferplan.InferencePlan:
    source = backbone.resolve(name)
    return inferplan.plan_model(source, hardware.load(device), task=None, tokens=tokens, trust_remote_code=False)


def test_a_long_context_is_read_in_pieces() -> None:
    """As the runtime does: the logits of a piece, and its attention's scores against all that came before."""
    found = planned("qwen2.5-0.5b", "raspberry-pi-5-8gb", tokens=32768)
    logits, scores = 256 * 151936 * 4, 256 * 14 * 32768 * 4
    fp32 = found.variants[0]
    assert logits + scores < fp32.working_bytes - inferplan.PROCESS_BYTES < 1.1 * (logits + scores)
    assert found.fits


def test_when_nothing_fits_what_would_is_named() -> None:
    failed = planned("t5-11b", "raspberry-pi-5-8gb")
    said = inferplan.remedy(failed, lambda tokens: planned("t5-11b", "raspberry-pi-5-8gb", tokens))
    name = said.removeprefix("What would: --target ").removesuffix(".")
    assert planned("t5-11b", name).fits and "--seq-len" not in said


def test_smaller_weights_fit_and_are_faster() -> None:
    found = planned("llama-3.1-8b", "raspberry-pi-5-8gb")
    fp32, int8, int4 = found.variants
    assert fp32.verdict == int8.verdict == "NO" and found.fits == (int4.verdict != "NO")
    assert fp32.weights_bytes == pytest.approx(8_030_261_248 * 4, rel=1e-3)
    assert 3.5 < fp32.weights_bytes / int8.weights_bytes < 3.6  # a scale for each 32 weights
    assert int4.write_tokens_per_second > int8.write_tokens_per_second > fp32.write_tokens_per_second  # type: ignore[operator]
    assert fp32.needed_bytes == fp32.weights_bytes + fp32.cache_bytes + fp32.working_bytes
    assert int4.cache_bytes == 2 * 32 * 8 * 128 * 512 * 4  # keys and values of 32 layers, 8 heads of 128, in fp32


def test_writing_is_no_faster_than_memory_allows() -> None:
    board = hardware.load("raspberry-pi-5-8gb")
    for variant in planned("qwen2.5-0.5b", board.name).variants:
        assert variant.write_tokens_per_second is not None
        moved = (variant.weights_bytes + variant.cache_bytes) * variant.write_tokens_per_second
        assert moved <= board.bandwidth


def test_a_classifier_only_reads() -> None:
    for variant in planned("minilm-l6", "raspberry-pi-5-8gb", 128).variants:
        assert (variant.cache_bytes, variant.write_tokens_per_second) == (0, None)


def test_the_context_must_fit_the_positions() -> None:
    with pytest.raises(UsageError, match="512 positions"):
        planned("minilm-l6", "raspberry-pi-5-8gb", 513)
    with pytest.raises(UsageError, match="1 tokens"):
        planned("minilm-l6", "raspberry-pi-5-8gb", 1)


def test_the_command() -> None:
    command = ["plan", "--infer", "--target", "raspberry-pi-5-8gb", "--model"]
    done = CliRunner().invoke(app, [*command, "smollm2-135m", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [variant["precision"] for variant in found["variants"]] == ["fp32", "int8", "int4"]
    assert CliRunner().invoke(app, [*command, "llama-3.1-70b"]).exit_code == 1
    for wrong in (["--method", "lora"], ["--gpu", "t4-16gb"]):
        assert isinstance(CliRunner().invoke(app, [*command, "smollm2-135m", *wrong]).exception, UsageError)
    without = CliRunner().invoke(app, ["plan", "--target", "t4-16gb", "--model", "smollm2-135m"])
    assert isinstance(without.exception, UsageError)
