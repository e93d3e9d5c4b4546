"""What is lost or damaged in a finished run is made again by the command that its error names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import training

from edgepeft import pipeline, recipe
from edgepeft.recipe import Recipe
from edgepeft.runtime.device import Device


def asked(**changes: object) -> Recipe:
    home = training.source("classification")
    values = {"model": str(home / "model"), "data": str(home / "data.jsonl"), "method": "lora", "precision": "fp32"}
    return recipe.create({**values, "microbatch": 2, "max_steps": 1, "variants": [], **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(asked(), tmp_path_factory.mktemp("whole") / "run").root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(run: Path, until: str = "export", **changes: object) -> list[str]:
    said: list[str] = []
    pipeline.run(asked(**changes), run, until=until, say=said.append)
    return said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "model.onnx.data"])
def test_a_damaged_device_folder_is_made_again(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run / "device" / name)
    said = again(run)
    assert "merge: done before" in said and any(line.startswith("export: once more. ") for line in said)
    assert Device.load(run / "device", threads=1).classify("the fox")
    assert "export: done before" in again(run)


def test_a_damaged_merged_model_is_made_again(run: Path) -> None:
    for name, damage in (("model.safetensors", cut), ("config.json", Path.unlink)):
        damage(run / "merged" / name)
        assert any(line.startswith("merge: once more. ") for line in again(run, "merge"))
        (run / "merged" / "NOTES.md").write_text("a user's own")
        assert "merge: done before" in again(run, "merge")
