"""The parity gate sees what it should see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from numpy.typing import NDArray
from tiny_graphs import exported, graphs, model, task

from edgepeft.evaluate import evaluate, sample_logits
from edgepeft.export import parity
from edgepeft.ledger import Row
from edgepeft.runtime.sessions import Graph, open_graphs


@pytest.mark.parametrize("name", ("bert", "llama", "t5"))
def test_metrics_are_those_of_the_torch_model(name: str) -> None:
    batches = [tiny.batch(task(name), 6, seed=seed) for seed in range(3)]
    arrays = [{key: value.numpy() for key, value in batch.items()} for batch in batches]

    def reference(index: int) -> NDArray[np.float32]:
        return sample_logits(model(name), [batches[index]])[0].numpy()

    found = parity.compare(graphs(name), arrays, reference)
    expected = evaluate(model(name), batches)
    assert found.metrics.keys() == expected.keys()
    assert found.metrics == pytest.approx(expected, rel=1e-4)
    assert 0 < found.deviation < 2e-5
    shifted = [reference(index) + np.float32(index / 4) for index in range(3)]
    deviation = parity.compare(graphs(name), arrays, lambda index: shifted[index]).deviation
    largest = max(1.0, *(np.abs(logits).max() for logits in shifted))
    assert deviation == pytest.approx(0.5 / largest, rel=1e-3)


def test_outputs_that_are_not_numbers_are_neither_right_nor_equal(tmp_path: Path) -> None:
    batch = {key: value.numpy() for key, value in tiny.batch("bert", 4).items()}
    batch["labels"] = np.zeros(4, np.int64)  # what argmax makes of NaN
    (token, *_) = set(batch["input_ids"][0]) - set(batch["input_ids"][1:].flat)
    proto = onnx.load(exported("bert") / "model.onnx")
    (table,) = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("word_embeddings.weight")]
    weights = onnx.numpy_helper.to_array(table).copy()
    weights[token] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(weights, table.name))
    onnx.save(proto, tmp_path / "model.onnx")

    reference = parity.target_logits(graphs("bert"), batch)
    damaged = open_graphs(tmp_path, "classification")
    assert np.isnan(parity.target_logits(damaged, batch)).all(axis=1).tolist() == [True, False, False, False]
    found = parity.compare(damaged, [batch, batch], lambda index: reference)
    assert np.isnan(found.deviation) and np.isnan(found.metrics["loss"])
    assert found.metrics["accuracy"] == (reference[1:].argmax(-1) == 0).sum() / 4
    row = Row(artefact="onnx-int8", metrics=found.metrics, deviation=found.deviation)
    assert parity.keeps_fine_tune("classification", row, row, None, 10)
    assert "nan" in parity.same_function(row)


def test_texts_are_classified_one_at_a_time_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of training's would take memory that the plan of an export does not count, and no device does it."""
    batch = {key: value.numpy() for key, value in tiny.batch("bert", 4).items()}
    fed: list[tuple[int, ...]] = []
    run = Graph.run

    def noted(graph: Graph, feed: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        fed.append(feed["input_ids"].shape)
        return run(graph, feed)

    monkeypatch.setattr(Graph, "run", noted)
    parity.target_logits(graphs("bert"), batch)
    assert fed == [(1, length) for length in batch["attention_mask"].sum(1)]


@pytest.mark.parametrize(
    "expected, found, share",
    [
        ([[1, 2, 3]], [[1, 2, 3]], 1.0),
        ([[1, 2, 3, 4]], [[1, 9, 3, 4]], 0.25),  # after the first difference the texts are different ones
        ([[1, 2]], [[1, 2, 3, 4]], 0.5),
        ([[1, 2], [5, 6]], [[1, 2], [7, 6]], 0.5),
        ([], [], 1.0),
    ],
)
def test_share_of_equal_tokens(expected: list[list[int]], found: list[list[int]], share: float) -> None:
    assert parity.same_tokens(expected, found) == share


def test_generated_tokens_end_with_the_stop_token() -> None:
    free = parity.generate(graphs("llama"), [5, 6, 7], 10, [], None)
    assert len(free) == 10
    stop = free[4]
    assert parity.generate(graphs("llama"), [5, 6, 7], 10, [stop], None) == free[: free.index(stop) + 1]


@pytest.mark.parametrize("name", ("bert", "llama", "t5"))
def test_speed_is_measured(name: str) -> None:
    latency, rate = parity.speed(graphs(name), task(name), 0 if name == "t5" else None, runs=2)
    assert 0 < latency < 10_000
    assert rate is None if name == "bert" else rate is not None and 0 < rate < 1e6


ROW = Row(artefact="onnx-fp32", deviation=1e-5, same_tokens=1.0)


@pytest.mark.parametrize(
    "row, refused_for",
    [
        (ROW, None),
        (replace(ROW, same_tokens=None), None),
        (replace(ROW, same_tokens=0.8), None),
        (replace(ROW, deviation=2e-3), "0.002"),
        (replace(ROW, deviation=None), "nan"),
        (replace(ROW, same_tokens=0.1), "10%"),
    ],
)
def test_an_unquantised_graph_must_be_the_same_function(row: Row, refused_for: str | None) -> None:
    said = parity.same_function(row)
    assert said == "" if refused_for is None else refused_for in said


@pytest.mark.parametrize(
    "task_name, base, tuned, row, kept",
    [
        ("classification", 0.5, 0.9, 0.86, True),  # a tenth of the 0.4 gained is lost
        ("classification", 0.5, 0.9, 0.855, False),
        ("classification", 0.9, 0.9, 0.885, True),  # nothing was gained: 2 % may go
        ("classification", 0.898, 0.9, 0.885, True),  # nor is hardly anything stricter than nothing
        ("classification", 0.9, 0.9, 0.88, False),
        ("classification", None, 0.9, 0.885, True),
        ("classification", 0.5, 0.9, 0.95, True),
        ("causal-lm", 3.0, 2.0, 2.1, True),
        ("causal-lm", 3.0, 2.0, 2.12, False),
        ("seq2seq", 2.0, 2.0, 2.03, True),
        ("seq2seq", 2.0, 2.0, 2.05, False),
    ],
)
def test_most_of_what_training_gained_must_be_kept(
    task_name: str, base: float | None, tuned: float, row: float, kept: bool
) -> None:
    name = "accuracy" if task_name == "classification" else "loss"

    def made(value: float) -> Row:
        return Row(artefact="", metrics={name: value})

    said = parity.keeps_fine_tune(task_name, made(row), made(tuned), None if base is None else made(base), 1000)
    assert (said == "") == kept
    if not kept:
        assert f"{row:.4f}" in said and f"{tuned:.4f}" in said


def test_two_examples_may_go() -> None:
    tuned, one, two = (Row(artefact="", metrics={"accuracy": right / 20}) for right in (18, 16, 15))
    assert not parity.keeps_fine_tune("classification", one, tuned, tuned, 20)
    assert "more than 0.1000" in parity.keeps_fine_tune("classification", two, tuned, tuned, 20)
