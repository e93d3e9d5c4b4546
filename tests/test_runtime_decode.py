"""Greedy generation over ONNX graphs, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exported
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from edgepeft.errors import EdgePeftError
from edgepeft.runtime import decode, sampling
from edgepeft.runtime.sessions import Graph, open_graphs

GENERATORS = ("causal-lm", "seq2seq")


def prompts(task: str, lengths: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random prompts of these lengths, padded on the left, and their mask."""
    random = np.random.default_rng(20 + len(lengths))
    ids = random.integers(3, len(exported.tokenizer(task)), (len(lengths), max(lengths)))
    mask = np.array([[0] * (max(lengths) - length) + [1] * length for length in lengths])
    return ids, mask


def onnx_tokens(
    task: str, ids: NDArray[np.int64], mask: NDArray[np.int64], tokens: int, eos: int | None
) -> NDArray[np.int64]:
    graphs = open_graphs(exported.folder(task), task, threads=1)
    start = 0 if task == "seq2seq" else None
    return decode.greedy(graphs, ids, mask, tokens, () if eos is None else (eos,), start)


@pytest.mark.parametrize("task", GENERATORS)
@pytest.mark.parametrize("lengths", [[1], [9], [3, 9, 6]])
def test_greedy_tokens_are_those_of_transformers(task: str, lengths: list[int]) -> None:
    ids, mask = prompts(task, lengths)
    expected = exported.greedy_tokens(task, ids, mask, 16, eos=None)
    assert max(lengths) == 1 or len(np.unique(expected)) > 4, "a degenerate model would prove nothing"
    np.testing.assert_array_equal(onnx_tokens(task, ids, mask, 16, eos=None), expected)


@pytest.mark.parametrize("task", GENERATORS)
def test_a_row_ends_at_its_end_token_while_the_others_go_on(task: str) -> None:
    ids, mask = prompts(task, [3, 9, 6])
    eos = int(exported.greedy_tokens(task, ids, mask, 16, eos=None)[1, 2])
    expected = exported.greedy_tokens(task, ids, mask, 16, eos)
    assert (expected[1] == eos).sum() > 1
    np.testing.assert_array_equal(onnx_tokens(task, ids, mask, 16, eos), expected)


def test_a_single_prompt_stops_right_after_its_end_token() -> None:
    ids, mask = prompts("causal-lm", [9])
    eos = int(onnx_tokens("causal-lm", ids, mask, 16, eos=None)[0, 4])
    found = onnx_tokens("causal-lm", ids, mask, 16, eos)
    assert found.shape[1] <= 5 and found[0, -1] == eos


@pytest.mark.parametrize("lengths", [[23], [23, 4]])
def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = prompts("causal-lm", lengths)
    positions = torch.tensor(mask).cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        output = exported.model("causal-lm")(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions
        )
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 5)
    graph = Graph(exported.folder("causal-lm") / "model.onnx", threads=1)
    found = next(decode.causal_steps(graph, ids, mask))
    np.testing.assert_allclose(found, output.logits[:, -1].numpy(), rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_numbers_end_the_generation() -> None:
    def steps() -> Iterator[Any]:
        yield np.zeros((1, 4), np.float32)
        yield np.full((1, 4), np.nan, np.float32)

    tokens = decode.generate(steps(), sampling.greedy, 5)  # type: ignore[arg-type]
    assert next(tokens) == [0]
    with pytest.raises(EdgePeftError, match="not a number at generated token 2"):
        next(tokens)


def test_a_graph_onnxruntime_cannot_read_is_named(tmp_path: Path) -> None:
    whole = (exported.folder("classification") / "model.onnx").read_bytes()
    for content in (b"", b"not a graph", whole[: len(whole) // 2], whole):  # the last lacks its external weights
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(EdgePeftError, match="model.onnx could not be loaded by onnxruntime"):
            open_graphs(tmp_path, "classification", threads=1)
    with pytest.raises(EdgePeftError, match=r"encoder.onnx is missing[^$]*encoder.onnx, decoder.onnx"):
        open_graphs(tmp_path, "seq2seq")


def test_a_cache_of_open_size_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(exported.graphs("causal-lm"), tmp_path / "graphs")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    value = next(value for value in graph.graph.input if value.name == "past_key_values.0.key")
    value.type.tensor_type.shape.dim[3].dim_param = "head_dim"
    onnx.save(graph, folder / "model.onnx")
    ids, mask = prompts("causal-lm", [3])
    with pytest.raises(EdgePeftError, match=r"leaves the size of its cache open[^$]*past_key_values.0.key"):
        decode.greedy(open_graphs(folder, "causal-lm", threads=1), ids, mask, 2)


def test_a_graph_fed_the_wrong_names_says_which_graph_failed() -> None:
    graph = Graph(exported.folder("classification") / "model.onnx", threads=1)
    with pytest.raises(EdgePeftError, match="model.onnx failed while it ran"):
        graph.run({"tokens": np.ones((1, 3), np.int64)})
