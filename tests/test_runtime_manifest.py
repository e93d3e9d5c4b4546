"""A device folder that was damaged is refused, with the file named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import exported
import pytest

from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.export.package import README
from edgepeft.runtime import manifest
from edgepeft.runtime.device import Device


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A device folder of its own, to be damaged."""
    return shutil.copytree(exported.folder("seq2seq"), tmp_path / "copy")


def test_every_file_is_checked_for_a_single_flipped_bit(copy: Path) -> None:
    found = {path.name for path in copy.iterdir()}
    assert {"decoder.onnx", "decoder.onnx.data", "encoder.onnx", "tokenizer.json"} <= found
    names = sorted(found - {manifest.MANIFEST, README})
    for name in names:
        whole = (copy / name).read_bytes()
        tampered = bytearray(whole)
        tampered[len(whole) // 2] ^= 1
        (copy / name).write_bytes(tampered)
        with pytest.raises(EdgePeftError, match=rf"{name} is corrupt or was changed") as caught:
            Device.load(copy)
        assert "export` again" in caught.value.remedy and caught.value.exit_code == 1
        (copy / name).write_bytes(whole)
    Device.load(copy)


def test_a_truncated_or_missing_file_is_named(copy: Path) -> None:
    path = copy / "decoder.onnx.data"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    cause = rf"decoder.onnx.data is incomplete[^$]*has {len(whole) - 10} bytes; manifest.json says {len(whole)}"
    with pytest.raises(EdgePeftError, match=cause):
        Device.load(copy)
    path.unlink()
    with pytest.raises(EdgePeftError, match="decoder.onnx.data is missing"):
        Device.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2[^$]*reads format 1"),
        ({"task": "sing"}, "unknown task 'sing'"),
        ({"eos_token_ids": "1"}, "'eos_token_ids' has a value of the wrong type"),
        ({"eos_token_ids": [True]}, "'eos_token_ids' has a value of the wrong type"),
        ({"metrics": {"loss": "low"}}, "'metrics' has a value of the wrong type"),
        ({"decoder_start_token_id": None}, "needs 'decoder_start_token_id'"),
        ({"task": "classification"}, "needs 'labels'"),
        ({"files": {}}, "encoder.onnx, decoder.onnx, tokenizer.json, which it omits"),
        ({"model": ...}, "lacks 'model'"),
        ({"max_tokens": -5}, "manifest.json is malformed[^$]*'max_tokens' is -5"),
        ({"template": {}}, "'template' is neither"),
        ({"template": {"kind": "chat", "roles": {"user": ["<user>"]}}}, "'template' is neither"),
        ({"template": {**exported.CHAT, "roles": {"user": ["<user>"]}}}, "'template' is neither"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    path = copy / manifest.MANIFEST
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(EdgePeftError, match=message):
        Device.load(copy)


@pytest.mark.parametrize("content", [b'{"format": 1, "task', b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(EdgePeftError, match="manifest.json is malformed"):
        Device.load(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..\\secret", ".."])
def test_a_manifest_cannot_point_outside_its_folder(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_text("x")
    path = copy / manifest.MANIFEST
    values = json.loads(path.read_text())
    values["files"][name] = {"sha256": manifest.sha256(copy.parent / "secret"), "bytes": 1}
    path.write_text(json.dumps(values))
    with pytest.raises(EdgePeftError, match="lies outside the folder"):
        Device.load(copy)


def test_a_link_cannot_point_outside_its_folder(copy: Path) -> None:
    moved = shutil.move(copy / "tokenizer.json", copy.parent / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(moved)
    with pytest.raises(EdgePeftError, match="'tokenizer.json', which lies outside the folder"):
        Device.load(copy)


def test_a_wrong_path_is_a_usage_error_with_a_hint(copy: Path) -> None:
    with pytest.raises(UsageError, match=rf"no folder .*copi[^$]*Device folders beside it: {copy}\."):
        Device.load(copy.with_name("copi"))
    with pytest.raises(UsageError, match=r"README.md is not a folder[^$]*It is a file"):
        Device.load(copy / README)
    run = copy.parent / "run"
    shutil.copytree(copy, run / "device")
    with pytest.raises(UsageError, match=rf"not a device folder[^$]*Did you mean {run / 'device'}\?"):
        Device.load(run)
    shutil.rmtree(run / "device")
    (run / "recipe.toml").touch()
    with pytest.raises(UsageError, match=rf"not a device folder[^$]*`edgepeft export {run}` makes it"):
        Device.load(run)
