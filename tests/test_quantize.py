"""Quantised graphs: the arithmetic is exact, what must stay is left alone, and nothing is stored twice."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from numpy.typing import NDArray
from tiny_graphs import exported, graphs, structure, task
from torch import Tensor, nn

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.export import packing, parity
from edgepeft.export.packing import BLOCK, CHANNEL_LIMIT, quantize_blocks, quantize_channels
from edgepeft.export.quantize import quantize
from edgepeft.export.translate import Graph, write
from edgepeft.files import size_bytes

NAMES = ("bert", "llama", "gpt2", "llama+lst", "t5", "t5-gated")
QUANTISED = ("MatMulNBits", "MatMulInteger")


def matrix(outputs: int, inputs: int) -> NDArray[np.float32]:
    """Rows of very different sizes, one of zeros."""
    random = np.random.default_rng(outputs * inputs)
    made = random.standard_normal((outputs, inputs)) * np.logspace(-3, 2, outputs)[:, None]
    made[outputs // 2] = 0
    return made.astype(np.float32)


def unpacked(weight: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """What ``quantize_blocks`` made of a weight."""
    data, scales = quantize_blocks(weight, bits)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], BLOCK)
    values = (data.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


def test_rows_are_rounded_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(11, 80)
    whole = [quantize_blocks(weight, bits) for bits in (4, 8)]
    monkeypatch.setattr(packing, "ROWS", 4)
    for bits, (data, scales) in zip((4, 8), whole, strict=True):
        parts = quantize_blocks(weight, bits)
        assert np.array_equal(parts[0], data) and np.array_equal(parts[1], scales)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("inputs", (32, 96, 80))
def test_blocks_round_to_the_nearest_step(bits: int, inputs: int) -> None:
    weight = matrix(6, inputs)
    error = np.abs(unpacked(weight, bits) - weight)
    for start in range(0, inputs, BLOCK):
        block = weight[:, start : start + BLOCK]
        peak = np.take_along_axis(block, np.abs(block).argmax(1)[:, None], 1)
        step = np.abs(peak) / 2 ** (bits - 1)
        clipped = np.abs(block + peak) < step / 2  # opposite the peak there is one step less
        allowed = np.where(clipped, step, step / 2) * (1 + 1e-5)
        assert (error[:, start : start + BLOCK] <= allowed).all()


def test_channels_round_to_the_nearest_step_within_seven_bits() -> None:
    weight = matrix(6, 50)
    integers, scales = quantize_channels(weight)
    assert integers.shape == (50, 6) and integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() == CHANNEL_LIMIT
    assert (np.abs(integers.T * scales[:, None].astype(np.float64) - weight) <= scales[:, None] * (0.5 + 1e-4)).all()


class _Layers(nn.Module):
    """A table, a layer with a bias, one without, and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 64)
        self.biased = nn.Linear(64, 48)
        self.plain = nn.Linear(48, 64, bias=False)
        with torch.no_grad():
            for layer in (self.table, self.biased, self.plain):
                layer.weight.copy_(torch.from_numpy(matrix(*layer.weight.shape)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        rows = self.table(inputs[0])
        first = self.biased(rows)
        second = self.plain(first)
        return rows, first, second, second @ self.table.weight.T


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[_Layers, Path]:
    folder = tmp_path_factory.mktemp("layers")
    made, ids = _Layers().eval(), torch.arange(6).view(2, 3)
    names = ["rows", "first", "second", "logits"]
    write(Graph("model", made, {"ids": (ids, {0: "batch", 1: "tokens"})}, names), folder / "model.onnx")
    return made, folder


def run(folder: Path) -> list[NDArray[np.float64]]:
    ids = np.array([[3, 199, 100, 0, 7]], np.int64)
    outputs = ort.InferenceSession(folder / "model.onnx").run(None, {"ids": ids})
    return [output.astype(np.float64) for output in outputs]


@pytest.mark.parametrize("variant, bits", [("int8", 8), ("int4", 4)])
def test_kernels_read_blocks_as_they_were_written(
    layers: tuple[_Layers, Path], variant: str, bits: int, tmp_path: Path
) -> None:
    module, source = layers
    quantize(source, variant, "causal-lm", tmp_path / variant)
    rows, first, second, logits = run(tmp_path / variant)
    table = unpacked(module.table.weight.detach().numpy(), 8)
    assert np.allclose(rows[0], table[[3, 199, 100, 0, 7]], rtol=1e-6)
    inputs: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = [
        (rows, unpacked(module.biased.weight.detach().numpy(), bits), first - module.biased.bias.detach().numpy()),
        (first, unpacked(module.plain.weight.detach().numpy(), bits), second),
        (second, table, logits),
    ]
    for given, weight, found in inputs:
        expected = given @ weight.T
        # the kernel rounds its inputs to 8 bits by block: at most half of 1/127 of the largest, times each weight
        allowed = np.abs(given).max(-1, keepdims=True) / 127 * np.abs(weight).sum(1)
        assert (np.abs(found - expected) <= allowed + 1e-6).all()


def test_kernels_round_activations_and_multiply_integers(layers: tuple[_Layers, Path], tmp_path: Path) -> None:
    module, source = layers
    quantize(source, "int8", "classification", tmp_path / "int8")
    rows, first, second, _ = run(tmp_path / "int8")
    for given, layer, found in (
        (rows, module.biased, first - module.biased.bias.detach().numpy()),
        (first, module.plain, second),
    ):
        integers, scales = quantize_channels(layer.weight.detach().numpy())
        low, high = min(given.min(), 0), max(given.max(), 0)
        step = (high - low) / 255
        zero = np.rint(-low / step)
        rounded = (np.clip(np.rint(given / step) + zero, 0, 255) - zero) * step
        expected = rounded @ (integers * scales.astype(np.float64))
        # float32 may round a value that lies between two steps the other way
        assert (
            np.abs(found - expected).max() <= 2 * step * np.abs(integers * scales).max() + 1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("name", NAMES)
def test_variants_are_smaller_and_nearly_the_same_function(name: str) -> None:
    batch = {key: value.numpy() for key, value in tiny.batch(task(name), 8).items()}
    reference = parity.target_logits(graphs(name), batch)
    errors = {}
    for variant in ("int8", "int4"):
        logits = parity.target_logits(graphs(name, variant), batch)
        errors[variant] = np.sqrt(np.mean((logits - reference) ** 2)) / reference.std()
        assert size_bytes(exported(name, variant)) < size_bytes(exported(name))
    assert 0 < errors["int8"] < 0.1
    assert errors["int8"] < errors["int4"] < 0.6


@pytest.mark.parametrize("variant", ("int8", "int4"))
@pytest.mark.parametrize("name", ("t5", "t5-gated"))
@pytest.mark.parametrize("graph", ("encoder", "decoder"))
def test_of_t5_everything_but_wo_is_quantised(name: str, graph: str, variant: str) -> None:
    nodes = structure(name, graph, variant).node
    kinds = Counter((node.name.rpartition("/")[0].rpartition(".")[2], node.op_type) for node in nodes)
    layers = sum(".wo/" in node.name for node in structure(name, graph).node if node.op_type == "MatMul")
    assert layers == 2 and kinds["wo", "MatMul"] == layers
    assert not [kind for kind in kinds if kind[0] == "wo" and kind[1] != "MatMul"]
    stored = {tensor.name for tensor in structure(name, graph, variant).initializer}
    left = [n.name for n in nodes if n.op_type == "MatMul" and n.input[1] in stored and ".wo/" not in n.name]
    assert not left


@pytest.mark.parametrize("variant", ("int8", "int4"))
@pytest.mark.parametrize("name, graph", [("gpt2", "model"), ("t5", "decoder")])
def test_a_head_tied_to_the_embedding_shares_its_bytes(name: str, graph: str, variant: str) -> None:
    proto = structure(name, graph, variant)
    made_by = {output: node for node in proto.node for output in node.output}
    tables = [made_by[node.input[0]].input[0] for node in proto.node if node.op_type == "GatherBlockQuantized"]
    (head,) = [node for node in proto.node if node.op_type in QUANTISED and node.name.startswith("lm_head/")]
    assert head.input[1] in tables
    shapes = {tuple(tensor.dims) for tensor in proto.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert (tiny.VOCABULARY, 32) not in shapes and (32, tiny.VOCABULARY) not in shapes


def test_the_labels_of_a_classifier_are_decided_in_fp32() -> None:
    for variant in ("int8", "int4"):
        (head,) = [node for node in structure("bert", "model", variant).node if node.name.startswith("classifier/")]
        assert head.op_type == "Gemm"


def test_every_layer_of_the_backbone_and_of_a_side_network_that_is_wide_enough_is_quantised() -> None:
    proto = structure("llama+lst", "model", "int8")
    quantised = {node.name.rpartition("/")[0] for node in proto.node if node.op_type in QUANTISED}
    assert {f"model.layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up", "down")} <= quantised


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int5'") as caught:
        quantize(exported("bert"), "int5", "classification", tmp_path / "int5")
    assert "int4" in caught.value.remedy and "int8" in caught.value.remedy


def test_a_folder_without_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgePeftError, match="holds no ONNX graph"):
        quantize(tmp_path, "int8", "classification", tmp_path / "int8")


@pytest.mark.parametrize("file", ("model.onnx", "model.onnx.data"))
def test_a_truncated_graph_is_named_and_the_variant_that_was_there_stays(file: str, tmp_path: Path) -> None:
    source, target = tmp_path / "fp32", tmp_path / "int8"
    shutil.copytree(exported("bert"), source)
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: len(content) // 2])
    target.mkdir()
    (target / "model.onnx").write_bytes(b"of an earlier run")
    with pytest.raises(EdgePeftError, match="model.onnx is damaged") as caught:
        quantize(source, "int8", "classification", target)
    assert caught.value.cause
    assert (target / "model.onnx").read_bytes() == b"of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "int8"]
