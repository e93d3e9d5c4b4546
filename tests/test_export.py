"""Exported graphs compute what the torch model does, at every batch and length, and hold nothing they do not need."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import tiny
import torch
from numpy.typing import NDArray
from tiny_graphs import exported, graphs, model, structure, task
from torch import Tensor, nn
from transformers import GenerationConfig

from edgepeft.errors import EdgePeftError
from edgepeft.evaluate import sample_logits
from edgepeft.export import parity
from edgepeft.export.onnx import export
from edgepeft.export.translate import Graph, write
from edgepeft.runtime import decode

CLASSIFIERS = ("bert", "distilbert")
DECODERS = ("llama", "qwen2", "gemma2", "gpt2", "llama+lst")
ENCODER_DECODERS = ("t5", "t5-gated", "t5+lst")
EVERY = (*CLASSIFIERS, *DECODERS, *ENCODER_DECODERS)
ROUNDING = 2e-5  # relative to the largest logit; the randomised weights amplify the usual 1e-6


def prompts(lengths: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts padded on the left to the longest, and their mask, each (batch, tokens)."""
    random, longest = np.random.default_rng(sum(lengths)), max(lengths)
    ids, mask = np.zeros((len(lengths), longest), np.int64), np.zeros((len(lengths), longest), np.int64)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = random.integers(2, tiny.VOCABULARY, length)
        mask[row, longest - length :] = 1
    return ids, mask


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows, lengths", [(1, (1, 1)), (1, (9, 9)), (2, (4, 4)), (5, (3, 13))])
def test_logits_are_those_of_torch_at_any_batch_and_length(name: str, rows: int, lengths: tuple[int, int]) -> None:
    if lengths == (1, 1) and task(name) == "causal-lm":
        lengths = (3, 3)  # the shortest that holds a prompt and an answer
    batch = tiny.batch(task(name), rows, lengths=lengths)
    (expected,) = (logits.numpy() for logits in sample_logits(model(name), [batch]))
    found = parity.target_logits(graphs(name), {key: value.numpy() for key, value in batch.items()})
    assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize("name", ("llama", "qwen2", "gpt2", "llama+lst", *ENCODER_DECODERS))
def test_generated_tokens_are_those_of_torch(name: str) -> None:
    start = 0 if task(name) == "seq2seq" else None
    torch_model = model(name)
    torch_model.generation_config.eos_token_id = None  # it would stand in for the None below
    settings = GenerationConfig(
        max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0, decoder_start_token_id=start
    )
    seen: set[int] = set()
    for lengths in ((7,), (1, 1), (3, 11, 8)):
        ids, mask = prompts(lengths)
        made = torch_model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings)
        expected = made[:, 1 if start == 0 else ids.shape[1] :].tolist()
        assert decode.greedy(graphs(name), ids, mask, 10, (), start).tolist() == expected
        seen.update(*expected)
    assert len(seen) >= 4, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("name", ("gemma2", "gpt2", "llama+lst"))
def test_a_prompt_may_be_read_in_pieces(name: str) -> None:
    graph, (ids, mask) = graphs(name)["model"], prompts((9, 12))
    with torch.no_grad():
        positions = torch.tensor(mask).cumsum(-1).sub(1).clamp(min=0)
        expected = model(name)(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions).logits
    cache = {
        key: np.zeros((2, node.shape[1], 0, node.shape[3]), np.float32)
        for key, node in graph.inputs.items()
        if key.startswith("past_key_values.")
    }
    for start, end in ((0, 5), (5, 6), (6, 12)):
        feed = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        outputs = {key: value.numpy() for key, value in graph.run({**cache, **feed}).items()}
        logits, wanted = outputs.pop("logits"), expected[:, start:end].numpy()
        read = mask[:, start:end].astype(bool)
        assert np.abs(logits - wanted)[read].max() <= ROUNDING * expected.abs().max()
        cache = {key.replace("present.", "past_key_values."): value for key, value in outputs.items()}


@pytest.mark.parametrize("name", ("llama", "gpt2", "bert"))
def test_every_weight_is_stored_once(name: str) -> None:
    stored = sum(math.prod(tensor.dims) for tensor in structure(name, "model").initializer)
    needed = sum(parameter.numel() for parameter in model(name).parameters())
    buffers = sum(buffer.numel() for buffer in model(name).buffers())
    assert needed <= stored <= needed + buffers + 300  # shapes and scalars


def test_the_encoder_graph_holds_no_more_of_the_decoder_than_cross_keys_and_values() -> None:
    t5 = model("t5-gated")
    attentions = [block.layer[1].EncDecAttention for block in t5.decoder.block]
    cross = [layer for attention in attentions for layer in (attention.k, attention.v)]
    needed = sum(p.numel() for module in (t5.encoder, *cross) for p in module.parameters())
    stored = sum(math.prod(tensor.dims) for tensor in structure("t5-gated", "encoder").initializer)
    assert needed <= stored <= needed + 300
    assert not [node.name for node in structure("t5-gated", "decoder").node if ".EncDecAttention.k/" in node.name]


def test_nodes_are_named_after_modules_and_no_path_of_this_machine_is_in_the_file() -> None:
    names = {node.name for node in structure("llama", "model").node}
    assert {"model.embed_tokens/Gather", "model.layers.1.self_attn.q_proj/MatMul", "lm_head/MatMul"} <= names
    content = (exported("llama") / "model.onnx").read_bytes()
    for module in (torch, tiny):
        assert module.__file__ is not None
        assert str(Path(module.__file__).parent).encode() not in content


@pytest.mark.parametrize(
    "change, cause", [(lambda m: m.train(), "training mode"), (lambda m: m.to(torch.bfloat16), "not in fp32")]
)
def test_only_an_fp32_model_in_evaluation_mode_is_taken(
    change: Callable[[nn.Module], nn.Module], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(EdgePeftError, match=cause) as caught:
        export(change(tiny.model("bert")), "classification", tmp_path / "onnx")
    assert "model.float().eval()" in caught.value.remedy
    assert not (tmp_path / "onnx").exists()


def test_a_model_that_cannot_be_traced_leaves_what_was_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Undecided(nn.Module):
        """A classifier whose computation depends on a value."""

        def __init__(self) -> None:
            super().__init__()
            self.classifier = tiny.model("bert")

        def forward(self, **inputs: Tensor) -> Tensor:
            output = self.classifier(**inputs)
            if output.logits.sum() > 0:
                output.logits = -output.logits
            return output

    before = tmp_path / "onnx" / "model.onnx"
    before.parent.mkdir()
    before.write_bytes(b"of an earlier run")
    with pytest.raises(EdgePeftError, match="The model graph could not be exported to ONNX"):
        export(Undecided().eval(), "classification", before.parent)
    assert before.read_bytes() == b"of an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))  # the weights are twice as large
    try:
        with pytest.raises(EdgePeftError, match="The disk is full"):
            export(tiny.model("bert"), "classification", tmp_path / "onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


class _ChangedAfterUse(nn.Module):
    """The sum was made before the change, and must not see it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        doubled = inputs[0] * 2
        before = doubled + 1
        doubled.add_(inputs[0])
        return before * doubled


class _ChangedThroughAView(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        doubled = inputs[0] * 2
        doubled[:, 0].add_(1)
        return doubled


class _ChangedFresh(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return (inputs[0] * 2).add_(inputs[0])


class _Untranslatable(nn.Module):
    """ONNX has no nan_to_num; torch decomposes it into what ONNX has."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.nan_to_num(inputs[0] / 0.0, nan=2.0, posinf=3.0, neginf=4.0)


@pytest.mark.parametrize("module", (_ChangedAfterUse(), _ChangedThroughAView(), _ChangedFresh(), _Untranslatable()))
def test_in_place_changes_and_unknown_operators_are_translated_right(module: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(2, 3)
    write(Graph("module", module, {"x": (example, {0: "batch"})}, ["y"]), tmp_path / "module.onnx")
    session = ort.InferenceSession(tmp_path / "module.onnx")
    values = torch.tensor([[0.0, -1.0, 2.5]] * 5)
    (found,) = session.run(None, {"x": values.numpy()})
    assert np.array_equal(found, module(values.clone()).numpy())
