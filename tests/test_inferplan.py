"""Plans of inference, against what exported graphs weigh and the caches that models make."""

from __future__ import annotations

import json
from dataclasses import replace
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
from edgepeft.hardware import Hardware

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
    return inferplan.plan_model(source, hardware.runner(device), task=None, tokens=tokens, trust_remote_code=False)


def test_a_long_context_is_read_in_pieces() -> None:
    """As the runtime does: the logits of a piece, and its attention's scores against all that came before."""
    found = planned("qwen2.5-0.5b", "raspberry-pi-5-8gb", tokens=32768)
    logits, scores = 256 * 151936 * 4, 256 * 14 * 32768 * 4
    fp32 = found.variants[0]
    assert logits + scores < fp32.working_bytes - inferplan.PROCESS_BYTES < 1.1 * (logits + scores)
    assert found.fits


@pytest.mark.parametrize(("family", "task"), [("llama", "causal-lm"), ("t5", "seq2seq")])
def test_a_head_of_its_own_is_no_layer_whose_states_are_held(family: str, task: str) -> None:
    models: list[Any] = [tiny.model(family, vocab_size=4096, tie_word_embeddings=tied) for tied in (True, False)]
    words, width = models[1].get_output_embeddings().weight.shape
    models[1].set_output_embeddings(torch.nn.Linear(width, words, bias=False))
    tied, untied = (inferplan._activation_bytes(model, task, 32) for model in models)
    assert tied == untied


def test_when_nothing_fits_what_would_is_named() -> None:
    """Among what runs device folders: a GPU in a computer has as much memory, and does not."""
    failed = planned("gemma-7b", "raspberry-pi-5-8gb")
    said = inferplan.remedy(failed, lambda tokens: planned("gemma-7b", "raspberry-pi-5-8gb", tokens))
    name = said.removeprefix("What would: --target ").removesuffix(".")
    assert planned("gemma-7b", name).fits and "--seq-len" not in said
    failed = planned("qwen2.5-32b", "raspberry-pi-5-8gb")
    assert "no profile has as much memory" in inferplan.remedy(failed, lambda tokens: failed)


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


EXACT = Hardware(
    name="exact",
    kind="cpu",
    title="A device whose peaks are reached",
    memory_bytes=1 << 40,
    reserved_bytes=0,
    bandwidth=1e9,
    flops={"fp32": 1e12, "int8": 4e12},
    providers=("CPUExecutionProvider",),
    reached={"matmul": 1.0, "thin": 1.0, "attention": 1.0, "elementwise": 1.0},
)


def fp32(name: str, tokens: int, **changes: Any) -> tuple[inferplan.Variant, Any]:
    """The most exact variant on a device that is easy to reckon with, and the model."""
    config = backbone.config(backbone.resolve(name), trust_remote_code=False)
    task = "seq2seq" if name.startswith("t5") else "causal-lm"
    device = replace(EXACT, **changes)
    with torch.device("meta"):
        model = backbone.skeleton(config, task=task, at="fp32").model
    return inferplan.plan(name=name, config=config, task=task, device=device, tokens=tokens).variants[0], model


def test_an_encoder_decoder_writes_with_its_decoder_and_reads_with_its_encoder() -> None:
    """T5-small has 6 layers in each, of 8 heads of 64; its tied head is a table of 32,128 words of 512."""
    variant, model = fp32("t5-small", 64)
    sizes = {name: weight.numel() for name, weight in model.named_parameters() if "relative" not in name}
    crossing = {name: n for name, n in sizes.items() if "EncDecAttention.k" in name or "EncDecAttention.v" in name}
    encoder = {name: n for name, n in sizes.items() if name.startswith("encoder.block")}
    decoder = {name: n for name, n in sizes.items() if name.startswith("decoder") and name not in crossing}
    assert len(crossing) == 12 and len(encoder) == 6 * 8
    moved = 4 * (sum(decoder.values()) + 32128 * 512) + variant.cache_bytes
    assert 1 / variant.write_tokens_per_second == pytest.approx(moved / 1e9)  # type: ignore[operator]
    products = sum(n for name, n in (encoder | crossing).items() if "norm" not in name)
    attention = 6 * 4 * 8 * 64 * 64
    assert 1 / variant.read_tokens_per_second == pytest.approx((2 * products + attention) / 1e12)


def test_a_table_of_its_own_is_not_read_for_every_token_that_is_written() -> None:
    """Llama 3.1 8B has two of 128,256 words of 4,096: one is looked up in, the other is the head."""
    variant, _ = fp32("llama-3.1-8b", 512)
    moved = variant.weights_bytes - 4 * 128256 * 4096 + variant.cache_bytes
    assert 1 / variant.write_tokens_per_second == pytest.approx(moved / 1e9, rel=1e-6)  # type: ignore[operator]


def test_longer_prompts_are_read_more_slowly() -> None:
    """A token attends to half of the prompt on average, and to half of the piece that it is read in."""
    short, long = (1 / fp32("llama-3.1-8b", tokens)[0].read_tokens_per_second for tokens in (512, 131072))
    each = 32 * 4 * 32 * 128  # of 32 layers of 32 heads of 128, for each token that is attended to
    assert long - short == pytest.approx(each * (131072 - 512) / 2 / 1e12)
    assert short == pytest.approx((2 * (8_030_261_248 - 128256 * 4096) + each * (512 + 256) / 2) / 1e12, rel=1e-3)


def test_writing_that_is_not_held_up_by_memory_computes_attention_too() -> None:
    short, long = (fp32("llama-3.1-8b", n, bandwidth=1e14)[0].write_tokens_per_second for n in (512, 131072))
    assert 1 / long - 1 / short == pytest.approx(32 * 4 * 32 * 128 * (131072 - 512) / 1e12)  # type: ignore[operator]


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
    shown = CliRunner().invoke(app, [*command, "smollm2-135m", "--seq-len", "64"])
    assert "of reading 64 tokens, and of writing after as many, on Raspberry Pi 5" in shown.output
    assert CliRunner().invoke(app, [*command, "llama-3.1-70b"]).exit_code == 1
    for wrong in (["--method", "lora"], ["--gpu", "t4-16gb"]):
        assert isinstance(CliRunner().invoke(app, [*command, "smollm2-135m", *wrong]).exception, UsageError)
    without = CliRunner().invoke(app, ["plan", "--target", "t4-16gb", "--model", "smollm2-135m"])
    assert isinstance(without.exception, UsageError)


def test_a_gpu_in_a_computer_is_refused_and_a_board_runs_on_its_processor() -> None:
    command = ["plan", "--infer", "--model", "smollm2-135m", "--json", "--target"]
    refused = CliRunner().invoke(app, [*command, "h100-80gb"]).exception
    assert isinstance(refused, UsageError) and "h100-80gb runs no device folder" in refused.fact
    found = json.loads(CliRunner().invoke(app, [*command, "jetson-orin-nano-8gb"]).stdout)
    board = hardware.load("jetson-orin-nano-8gb")
    assert found["hardware"] == board.name and found["available_bytes"] > board.available_bytes
    slower = json.loads(CliRunner().invoke(app, [*command, "raspberry-pi-5-8gb"]).stdout)
    pairs = zip(found["variants"], slower["variants"], strict=True)
    assert all(mine["read_tokens_per_second"] > other["read_tokens_per_second"] for mine, other in pairs)
