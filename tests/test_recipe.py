"""Recipes survive their file, take settings from the command line, and refuse what makes no sense."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgepeft import recipe
from edgepeft.errors import UsageError
from edgepeft.methods import base
from edgepeft.recipe import Recipe

FULL: dict[str, Any] = {
    "model": 'C:\\models\\"quoted"\nand\tmore \x7f\x00 é 東京',
    "data": "data.jsonl",
    "task": "classification",
    "columns": {"text": "review", "label": "the label.x"},
    "validation": "dev.jsonl",
    "hardware": "cpu-x86-16gb",
    "method": "lora",
    "options": {"rank": 4, "alpha": 1e-05, "targets": ["query", "value"]},
    "precision": "nf4",
    "microbatch": 2,
    "checkpointing": False,
    "optimizer": "adamw-8bit",
    "epochs": 0.5,
    "max_steps": 7,
    "lr": 1e-05,
    "patience": 3,
    "variants": ["int8", "int4"],
    "trust_remote_code": True,
}


@pytest.mark.parametrize("values", [{"model": "m", "data": "d"}, FULL])
def test_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    written = recipe.create(values)
    recipe.write(written, tmp_path / "recipe.toml")
    read = recipe.read(tmp_path / "recipe.toml")
    assert recipe.create(read) == written
    assert values.items() <= read.items()


def test_a_file_with_defaults_leaves_open_what_the_plan_chooses() -> None:
    read = tomllib.loads(recipe.dumps(Recipe(model="m", data="d")))
    assert not {"method", "precision", "microbatch", "checkpointing", "lr", "options"} & read.keys()
    assert read["global_batch"] == 16 and read["seed"] == 0


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lr=1e-3", {"lr": 1e-3}),
        ("max_steps=10", {"max_steps": 10}),
        ("checkpointing=true", {"checkpointing": True}),
        ("method=lora", {"method": "lora"}),
        ("model=./models/a=b", {"model": "./models/a=b"}),
        ('model="a b"', {"model": "a b"}),
        ("options.rank=16", {"options": {"dropout": 0.1, "rank": 16}}),
        ('options.targets=["query"]', {"options": {"dropout": 0.1, "targets": ["query"]}}),
        ("columns.text=review", {"columns": {"text": "review"}}),
        ("hardware=2024-01", {"hardware": "2024-01"}),
        (" lr = 2.0", {"lr": 2.0}),
    ],
)
def test_settings(setting: str, expected: dict[str, Any]) -> None:
    values: dict[str, Any] = {"options": {"dropout": 0.1}}
    recipe.assign(values, setting)
    assert values == {"options": {"dropout": 0.1}} | expected


@pytest.mark.parametrize(("setting", "part"), [("lr", "key=value"), ("model.x=1", "model is not a table")])
def test_settings_that_cannot_be_made(setting: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        recipe.assign({"model": "m"}, setting)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"modle": "x"}, "there is no 'modle'"),
        ({"epochs": "two"}, r'epochs = "two" is not of the right type'),
        ({"epochs": True}, r"epochs = true is not of the right type"),
        ({"microbatch": 2.0}, "microbatch = 2.0 is not of the right type"),
        ({"seed": None}, r"seed = null is not of the right type"),
        ({"columns": ["text"]}, r'columns = \["text"\] is not of the right type'),
        ({"columns": {"text": 1}}, r'columns = {"text": 1} is not of the right type'),
        ({"variants": [8]}, r"variants = \[8\] is not of the right type"),
        ({"hardware": datetime.date(2024, 1, 1)}, 'hardware = "2024-01-01" is not of the right type'),
        ({"lr": float("nan")}, "lr = nan is no number to count with[^$]*finite"),
        ({"epochs": float("inf")}, "epochs = inf"),
        ({"microbatch": 0}, "microbatch = 0 must be positive"),
        ({"max_steps": 0}, "max_steps = 0 must be positive"),
        ({"devices": 0}, "devices = 0 must be positive"),
        ({"devices": 3}, "A global batch of 16 cannot be shared among 3 devices"),
        ({"max_target_tokens": 0}, "max_target_tokens = 0 must be positive"),
        ({"lr": -1e-3}, "lr = -0.001 must be positive"),
        ({"patience": 0}, "patience = 0 must be positive"),
        ({"seed": -1}, "seed = -1 must not be negative"),
        ({"seed": 5_000_000_000}, "seed = 5000000000 is too large"),
        ({"max_tokens": 10**12}, "max_tokens = 1000000000000 is too large"),
        ({"max_target_tokens": 10**12}, "max_target_tokens = 1000000000000 is too large"),
        ({"global_batch": 10**12}, "global_batch = 1000000000000 is too large"),
        ({"epochs": 1e308}, r"epochs = 1e\+308 is too large"),
        ({"epochs": 10**400}, "epochs = 1000+ is too large"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 must not be negative"),
        ({"warmup": 1.0}, "warmup = 1.0 is not a share between 0 and 1"),
        ({"validation_fraction": 0.0}, "validation_fraction = 0.0 is not a share between 0 and 1"),
        ({"schedule": "cosin"}, "'cosin' is not known here"),
        ({"variants": ["int9"]}, "'int9' is not known here"),
    ],
)
def test_refusals(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        recipe.create({"model": "m", "data": "d"} | change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"microbatch": 2.5}, "Expected a whole number."),
        ({"epochs": "two"}, "Expected a number."),
        ({"variants": 8}, "Expected a list of names."),
        ({"checkpointing": "yes"}, "Expected true or false."),
        ({"method": 3}, "Expected text."),
        ({"columns": "review"}, "Expected a table."),
    ],
)
def test_types_are_told_in_words(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.create({"model": "m", "data": "d"} | change)
    assert caught.value.cause == expected


def test_one_name_is_a_list_of_one(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": "m", "data": "d"}
    recipe.assign(values, "variants=int4")
    assert recipe.create(values).variants == ("int4",)
    recipe.write(recipe.create(values), tmp_path / "recipe.toml")
    assert recipe.read(tmp_path / "recipe.toml")["variants"] == ["int4"]
    assert base.create("lora", {"targets": "query"}) == base.create("lora", {"targets": ["query"]})


def test_the_largest_seed_is_one() -> None:
    assert recipe.create({"model": "m", "data": "d", "seed": 2**32 - 1, "epochs": 1_000_000}).seed == 2**32 - 1


def test_refusals_name_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        recipe.create({"model": "m", "data": "d", "modle": "x"})
    assert "model" in caught.value.remedy
    with pytest.raises(UsageError) as caught:
        recipe.create({"model": "m", "data": "d", "schedule": "cosin"})
    assert "cosine" in caught.value.remedy


@pytest.mark.parametrize("name", ["model", "data"])
def test_what_every_recipe_needs(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is missing") as caught:
        recipe.create({key: "x" for key in ("model", "data") if key != name})
    assert f"--{name}" in caught.value.remedy


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no recipe"):
        recipe.read(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("model = \n")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        recipe.read(tmp_path / "bad.toml")
    assert "line 1" in caught.value.cause
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        recipe.read(tmp_path / "binary.toml")
    with pytest.raises(UsageError, match="cannot be read[^$]*It is a folder[^$]*name of a file"):
        recipe.read(tmp_path)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(UsageError, match=rf"Did you mean {tmp_path / 'recipe.toml'}\?"):
        recipe.read(tmp_path)
