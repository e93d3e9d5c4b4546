"""Graphs of ONNX Runtime GenAI's builder are held to the same gate as our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exported
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers import GenerationConfig

from edgepeft.errors import EdgePeftError
from edgepeft.evaluate import sample_logits
from edgepeft.export import genai, parity
from edgepeft.export.quantize import quantize
from edgepeft.files import size_bytes
from edgepeft.runtime.sessions import open_graphs

pytest.importorskip("onnxruntime_genai")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("family, tied", [("Llama", True), ("Qwen2", False), ("Qwen3", True)])
def test_the_built_graph_is_the_model_and_quantises(family: str, tied: bool, tmp_path: Path) -> None:
    tokenizer = exported.tokenizer("causal-lm")
    head = {"head_dim": 16} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(
        **SIZES,
        **head,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config)
    tiny.randomise(model)
    model.eval().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    assert genai.buildable(tmp_path / "merged")
    assert genai.build(tmp_path / "merged", tmp_path / "fp32") == [tmp_path / "fp32" / "model.onnx"]
    assert sorted(path.name for path in (tmp_path / "fp32").iterdir()) == ["model.onnx", "model.onnx.data"]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert size_bytes(tmp_path / "fp32") < 4 * weights + 60_000  # the tied head is stored once; the rest is the graph

    batch = tiny.batch("causal-lm", 4)
    arrays = {key: value.numpy() for key, value in batch.items()}
    (expected,) = (logits.numpy() for logits in sample_logits(model, [batch]))
    graphs = open_graphs(tmp_path / "fp32", "causal-lm")
    assert parity.compare(graphs, [arrays], lambda index: expected).deviation < 2e-5

    prompt = [5, 9, 30, 12, 7]
    model.generation_config.eos_token_id = None
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
    assert parity.generate(graphs, prompt, 12, [], None) == made

    for variant, allowed in (("int8", 0.05), ("int4", 0.5)):
        quantize(tmp_path / "fp32", variant, "causal-lm", tmp_path / variant)
        logits = parity.target_logits(open_graphs(tmp_path / variant, "causal-lm"), arrays)
        assert np.sqrt(np.mean((logits - expected) ** 2)) < allowed * expected.std()
        assert size_bytes(tmp_path / variant) < 0.6 * size_bytes(tmp_path / "fp32")


@pytest.mark.parametrize("architectures", (["T5ForConditionalGeneration"], [], None))
def test_other_models_are_left_to_the_tracer(architectures: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert not genai.buildable(tmp_path)


def test_a_failure_says_what_the_builder_said(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(EdgePeftError, match="could not export") as caught:
        genai.build(tmp_path / "merged", tmp_path / "fp32")
    assert "tokenizer" in caught.value.cause and "pip uninstall onnxruntime-genai" in caught.value.remedy
    assert not (tmp_path / "fp32").exists()
