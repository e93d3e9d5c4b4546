"""What makes a run another one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny

from edgepeft import fingerprints, pipeline
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.recipe import Recipe
from edgepeft.workspace import Workspace


def recipe(folder: Path, **changes: object) -> Recipe:
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values: dict[str, object] = {"model": str(tiny.folder("llama")), "data": str(folder / "data.jsonl"), **changes}
    return Recipe(**values)  # type: ignore[arg-type]


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Adapter folders of two runs of prompt tuning."""
    sources = tiny.prompts("llama")[:2]
    return [str(shutil.copytree(source, tmp_path / Path(source).name)) for source in sources]


@pytest.mark.parametrize("name", ["spot", "ipt"])
def test_another_adapter_to_start_from_makes_another_run(name: str, prompts: list[str], tmp_path: Path) -> None:
    options = {"source": prompts[0]} if name == "spot" else {"prompts": tuple(prompts)}
    wanted = recipe(tmp_path, method=name, options=options)
    space = Workspace(tmp_path / "run")
    before = space.training_inputs(wanted)
    assert space.training_inputs(wanted) == before
    shutil.copytree(tiny.prompts("llama")[2], prompts[0], dirs_exist_ok=True)
    assert space.training_inputs(wanted) != before


def test_a_trained_run_does_not_miss_what_it_started_from(prompts: list[str], tmp_path: Path) -> None:
    wanted = recipe(tmp_path, method="spot", options={"source": prompts[0]})
    before = Workspace(tmp_path / "run").training_inputs(wanted)
    shutil.rmtree(prompts[0])
    assert Workspace(tmp_path / "run").training_inputs(wanted) == before
    assert Workspace(tmp_path / "other").training_inputs(wanted) != before


def test_another_configuration_of_peft_makes_another_run(tmp_path: Path) -> None:
    described = tmp_path / "adapter_config.json"
    described.write_text('{"peft_type": "LOHA", "r": 4}')
    wanted, space = recipe(tmp_path, method=f"peft:{described}"), Workspace(tmp_path / "run")
    before = space.training_inputs(wanted)
    described.write_text('{"peft_type": "LOHA", "r": 8}')
    assert space.training_inputs(wanted) != before


def test_options_that_name_no_adapter_change_nothing(tmp_path: Path) -> None:
    wanted, space = (
        recipe(tmp_path, method="lora", options={"targets": ("query", "value")}),
        Workspace(tmp_path / "run"),
    )
    assert space.training_inputs(wanted) == space.training_inputs(wanted)
    assert not (tmp_path / "run").exists()


def test_two_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path / "run").alone():
        with pytest.raises(UsageError, match="Another process works in"), Workspace(tmp_path / "run").alone():
            pass
        with pytest.raises(UsageError, match="Another process works in"):
            pipeline.run(recipe(tmp_path), tmp_path / "run")
        with Workspace(tmp_path / "other").alone():
            pass
    with Workspace(tmp_path / "run").alone():
        assert not (tmp_path / "run").exists()


def test_a_copy_is_the_same_and_what_differs_is_named(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny.folder("llama"), tmp_path / "model"))
    wanted, space = recipe(tmp_path, model=str(model)), Workspace(tmp_path / "run")
    (tmp_path / "run").mkdir()
    before = space.training_inputs(wanted)
    space.finish("training", before)
    for file in model.iterdir():
        os.utime(file, (1, 1))  # as a copy's times are others
    assert space.training_inputs(wanted) == before and not space.changed("training", before)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert space.changed("training", space.training_inputs(wanted)) == ["the model"]
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert space.changed("training", space.training_inputs(wanted)) == ["the data", "the model"]


def test_large_weights_are_known_by_pieces_all_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_PIECES", 4)
    monkeypatch.setattr(fingerprints, "_PIECE", 16)
    file = tmp_path / "model.safetensors"
    whole = bytes(range(200))
    found = set()
    for at in (None, 0, 70, 130, 199):
        file.write_bytes(whole if at is None else whole[:at] + b"!" + whole[at + 1 :])
        found.add(fingerprints.fingerprint(tmp_path))
    assert len(found) == 5


def test_a_state_that_is_none_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("[1]")
    with pytest.raises(EdgePeftError, match="state.json is damaged"):
        Workspace(tmp_path).done("train", "x")
