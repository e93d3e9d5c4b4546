"""What is lost or damaged in a finished run is made again by the command that its error names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import training

from edgepeft import ledger, pipeline, recipe
from edgepeft.errors import EdgePeftError, UsageError
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


def test_without_its_state_a_run_is_checked_and_goes_on(run: Path, tmp_path: Path) -> None:
    made = training.result(run)
    (run / "state.json").unlink()
    said = again(run)
    assert any("whether the data is what it was trained on cannot be known" in line for line in said)
    assert "train: done before" in said and training.result(run) == made
    assert {"merge: done before", "export: done before"} <= set(again(run))
    (run / "state.json").unlink()
    other = Path(shutil.copytree(asked().model, tmp_path / "other"))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    text = (run / "recipe.toml").read_text().replace(asked().model, str(other))
    (run / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match="does not belong to this run"):
        again(run, model=str(other))


def test_without_its_ledger_a_run_is_measured_again(run: Path) -> None:
    before = {row.artefact: row for row in ledger.read(run / "ledger.json")}
    made = training.result(run)
    (run / "ledger.json").unlink()
    assert "train: done before" in again(run)
    after = {row.artefact: row for row in ledger.read(run / "ledger.json")}
    assert after.keys() == before.keys() and training.result(run) == made
    assert after["adapter"].metrics == pytest.approx(before["adapter"].metrics)
    assert after["adapter"].counts["training_peak_bytes"] == before["adapter"].counts["training_peak_bytes"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_what_the_error_of_a_damaged_adapter_says_makes_it_whole(run: Path, name: str) -> None:
    made = training.result(run)
    cut(run / "adapter" / name)
    with pytest.raises(EdgePeftError, match=name) as caught:
        again(run, "merge")
    assert f"Delete the folder {run / 'adapter'} and run `edgepeft train --out {run}`" in caught.value.remedy
    shutil.rmtree(run / "adapter")
    again(run, "train")
    assert training.result(run) == made and "merge: done before" in again(run, "merge")
    cut(run / "adapter" / name)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(EdgePeftError, match=name) as caught:
        again(run, "merge")
    assert "Delete" not in caught.value.remedy


def test_a_plan_of_another_model_is_made_again_until_training_begins(tmp_path: Path) -> None:
    home = Path(shutil.copytree(asked().model, tmp_path / "model"))
    (home / "model.safetensors").unlink()
    found: list[tuple[bool, int]] = []
    for layers in (2, 2, 3):
        config = json.loads((home / "config.json").read_text())
        (home / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        said: list[str] = []
        with pytest.raises(EdgePeftError):
            pipeline.run(asked(model=str(home), microbatch=None), tmp_path / "run", until="train", say=said.append)
        before = [line for line in said if line.startswith("plan: ")]
        predicted = json.loads((tmp_path / "run" / "plan.json").read_text())["predicted_peak_bytes"]
        found.append((before[0].endswith("(as before)"), predicted))
    assert [kept for kept, _ in found] == [False, True, False]
    assert found[0][1] == found[1][1] < found[2][1]


@pytest.mark.parametrize("other", ["data", "hardware"])
def test_a_plan_of_other_data_or_hardware_is_made_again(tmp_path: Path, other: str) -> None:
    """Both are larger: longer texts, which take more, or more memory, in which more fits."""
    rows = Path(asked().data).read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")

    def planned(board: str) -> tuple[bool, int]:
        wanted = asked(data=str(tmp_path / "data.jsonl"), hardware=board, max_tokens=32)
        said: list[str] = []
        pipeline.run(wanted, tmp_path / "run", until="plan", say=said.append)
        [line] = [line for line in said if line.startswith("plan: ")]
        found = json.loads((tmp_path / "run" / "plan.json").read_text())
        return line.endswith("(as before)"), found["predicted_phases"]["forward+backward"]

    first, again = planned("raspberry-pi-5-8gb"), planned("raspberry-pi-5-8gb")
    if other == "data":
        longer = [json.dumps({**json.loads(row), "text": " ".join(training.WORDS * 4)}) for row in rows]
        (tmp_path / "data.jsonl").write_text("\n".join(longer), encoding="utf-8")
    changed = planned("raspberry-pi-5-8gb" if other == "data" else "cpu-x86-16gb")
    assert (first[0], again, changed[0]) == (False, (True, first[1]), False)
    assert (changed[1] > first[1]) == (other == "data")


def test_without_its_plan_a_run_that_was_interrupted_goes_on(run: Path) -> None:
    """As when a user follows what is said of a damaged plan.json; the adapter is made from the last checkpoint."""
    made = training.result(run)
    shutil.rmtree(run / "adapter")
    (run / "plan.json").unlink()
    said = again(run, "train")
    assert any(line.startswith("train: ") and "done before" not in line for line in said)
    assert training.result(run) == made
