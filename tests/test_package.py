"""The device folder as it is made: complete, the same tokens as in training, and never half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import exported
import numpy as np
import onnx
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import edgepeft
from edgepeft.errors import EdgePeftError
from edgepeft.export.package import package
from edgepeft.files import sha256
from edgepeft.runtime import manifest
from edgepeft.runtime.device import Device

TASKS = tuple(manifest.GRAPHS)


@pytest.mark.parametrize("task", TASKS)
def test_the_manifest_says_what_was_given_and_what_is_there(task: str, tmp_path: Path) -> None:
    given = exported.arguments(task, tmp_path / "device")
    assert package(**given) == tmp_path / "device"
    names = {path.name for path in (tmp_path / "device").iterdir()}
    graphs = {path.name for path in given["graphs"].iterdir()}
    assert names == graphs | {"tokenizer.json", "manifest.json", "README.md"}
    said = (tmp_path / "device" / "README.md").read_text()
    assert f"tiny-{task}, tuned by lora" in said and "python -m edgepeft.runtime ." in said
    written = json.loads((tmp_path / "device" / "manifest.json").read_text())
    files = written.pop("files")
    assert set(files) == names - {"manifest.json", "README.md"}
    for name, entry in files.items():
        path = tmp_path / "device" / name
        assert entry == {"sha256": sha256(path), "bytes": path.stat().st_size}
    optional = {key: given[key] for key in ("labels", "decoder_start_token_id") if given[key] is not None}
    assert written == {
        "format": 1,
        "task": task,
        "template": given["template"],
        "eos_token_ids": given["eos_token_ids"],
        "max_tokens": exported.MAX_TOKENS,
        "add_special_tokens": task != "causal-lm",
        "model": f"tiny-{task}",
        "method": "lora",
        "precision": "fp32",
        "metrics": {"loss": 1.5},
        "edgepeft": edgepeft.__version__,
        **optional,
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_device_reads_long_texts_as_transformers_does(task: str) -> None:
    text = " ".join(exported.CORPUS[:3])
    device = Device.load(exported.folder(task), threads=1)
    expected = exported.tokenizer(task)(text, add_special_tokens=task != "causal-lm", truncation=False)["input_ids"]
    found = device.tokenizer.encode(text, add_special_tokens=device.manifest.add_special_tokens).ids
    assert found == expected and len(found) > 8, "the classifier's tokenizer cuts and pads to 8 tokens"


def test_a_plain_prompt_gets_the_special_tokens_that_transformers_adds(tmp_path: Path) -> None:
    tokenizer = exported.tokenizer("causal-lm")
    given = {**exported.arguments("causal-lm", tmp_path / "device"), "template": exported.PLAIN}
    device = Device.load(package(**given), threads=1)
    assert device.manifest.add_special_tokens
    assert device.encode("Grüße") == tokenizer("Grüße")["input_ids"]


def test_the_graphs_take_no_room_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = exported.arguments("classification", tmp_path / "device")
    package(**given)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "device" / name).samefile(given["graphs"] / name)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    package(**given)
    for name in ("model.onnx", "model.onnx.data"):
        copied = tmp_path / "device" / name
        assert not copied.samefile(given["graphs"] / name)
        assert copied.read_bytes() == (given["graphs"] / name).read_bytes()


def test_graphs_behind_links_become_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in exported.graphs("classification").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    given = {**exported.arguments("classification", tmp_path / "device"), "graphs": tmp_path / "links"}
    assert not any(path.is_symlink() for path in package(**given).iterdir())


def without(name: str) -> Any:
    def change(given: dict[str, Any], tmp_path: Path) -> None:
        given["graphs"] = shutil.copytree(given["graphs"], tmp_path / "graphs")
        (given["graphs"] / name).unlink()

    return change


def set_to(**values: Any) -> Any:
    def change(given: dict[str, Any], tmp_path: Path) -> None:
        given.update(values)

    return change


def damage(given: dict[str, Any], tmp_path: Path) -> None:
    """Weights that load but are no numbers."""
    given["graphs"] = shutil.copytree(given["graphs"], tmp_path / "graphs")
    graph = onnx.load(given["graphs"] / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = np.full_like(onnx.numpy_helper.to_array(tensor), np.nan).tobytes()
    onnx.save(graph, given["graphs"] / "model.onnx")


def split_specials(given: dict[str, Any], tmp_path: Path) -> None:
    """A setting that only transformers knows: special tokens in the text are spelt out."""
    backend = exported.tokenizer("causal-lm").backend_tokenizer
    given["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("classification", without("model.onnx"), "graphs/model.onnx is missing"),
        ("classification", without("model.onnx.data"), "model.onnx could not be loaded"),
        ("seq2seq", without("encoder.onnx"), "graphs/encoder.onnx is missing"),
        ("classification", damage, "output is not a number"),
        ("classification", set_to(labels=["no", "yes"]), "graph has 3 outputs; the manifest names 2 labels"),
        ("seq2seq", set_to(decoder_start_token_id=None), "needs 'decoder_start_token_id'"),
        ("causal-lm", set_to(tokenizer=ByT5Tokenizer()), "ByT5Tokenizer has no tokenizer.json"),
        ("causal-lm", split_specials, "tokenizer.json alone does not reproduce"),
    ],
)
def test_a_failure_leaves_the_folder_that_was_there(task: str, change: Any, message: str, tmp_path: Path) -> None:
    target = shutil.copytree(exported.folder(task), tmp_path / "device")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    given = exported.arguments(task, target)
    change(given, tmp_path)
    with pytest.raises(EdgePeftError, match=message):
        package(**given)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("device", "graphs")] == []
