"""The tools that fetch real models and data: what they lay out is whole, honest and the same every time."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import docs
import probe
import tiny_t5
from edgepeft import hardware
from edgepeft.errors import EdgePeftError
from edgepeft.files import sha256
from edgepeft.methods import base
from edgepeft.recipe import Recipe, assign, create
from fetch import Package, downloaded, keep

ROOT = Path(__file__).resolve().parent.parent
DATA, MODELS = ROOT / "data", ROOT / "models"
PACKAGE = Package(name="snippets", version="1.0", sha256="0" * 64, licence="MIT")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index on disk with one wheel, snippets 1.0."""
    wheel = tmp_path / "index" / "snippets-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("snippets/text.txt", "real text")
        archive.writestr("snippets-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: snippets\nVersion: 1.0\n")
        archive.writestr("snippets-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("snippets-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_a_download_is_handed_over_only_with_the_pinned_bytes(index: Path) -> None:
    with downloaded(Package(name="snippets", version="1.0", sha256=sha256(index), licence="MIT")) as archive:
        assert zipfile.ZipFile(archive).read("snippets/text.txt") == b"real text"
    with pytest.raises(EdgePeftError) as refused, downloaded(PACKAGE):
        pass
    assert sha256(index) in refused.value.cause and PACKAGE.sha256 in refused.value.cause


def test_a_missing_package_says_what_pip_said(index: Path) -> None:
    with pytest.raises(EdgePeftError, match="snippets 2.0 could not be downloaded") as refused:
        with downloaded(Package(name="snippets", version="2.0", sha256="", licence="MIT")):
            pass
    assert "No matching distribution found for snippets==2.0" in refused.value.cause


def test_keep_makes_once_and_repairs_damage(tmp_path: Path) -> None:
    folder, script = tmp_path / "kept", tmp_path / "script.py"
    script.write_text("one")

    def make(into: Path) -> None:
        (into / "inner").mkdir()
        (into / "inner" / "text").write_text(script.read_text())

    def kept() -> bool:
        return keep(folder, [PACKAGE], [script], make)

    assert kept() and not kept()
    (folder / "inner" / "text").write_text("damaged")
    assert kept() and (folder / "inner" / "text").read_text() == "one" and not kept()
    (folder / "stray").write_text("not made here")
    assert kept() and not (folder / "stray").exists()
    script.write_text("two")
    assert kept() and (folder / "inner" / "text").read_text() == "two"
    (folder / "source.json").write_text('{"packages": ')
    assert kept() and not kept()


def test_keep_leaves_what_was_there_when_making_fails(tmp_path: Path) -> None:
    folder, script = tmp_path / "kept", tmp_path / "script.py"
    script.write_text("one")

    def make(into: Path) -> None:
        (into / "text").write_text("first")

    keep(folder, [PACKAGE], [script], make)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    script.write_text("two")

    def fail(into: Path) -> None:
        (into / "text").write_text("half")
        raise EdgePeftError("it failed")

    with pytest.raises(EdgePeftError, match="it failed"):
        keep(folder, [PACKAGE], [script], fail)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "script.py"}


def rows(name: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_no_text_is_on_both_sides_and_labels_are_balanced() -> None:
    train, validation = rows("sentiment", "train"), rows("sentiment", "validation")
    sides = [{re.sub(r"\W+", " ", row["text"].casefold()).strip() for row in side} for side in (train, validation)]
    assert [len(side) for side in sides] == [len(train), len(validation)] and not sides[0] & sides[1]
    assert 0.08 < len(validation) / len(train + validation) < 0.12
    for some in (train, validation, train[:200], train[-200:]):  # no stretch of the file is of one label
        assert 0.4 < sum(row["label"] == "positive" for row in some) / len(some) < 0.6


def test_every_shape_tells_the_same_examples() -> None:
    for split in ("train", "validation"):
        plain = [(row["text"], row["label"]) for row in rows("sentiment", split)]
        prompts = [(row["prompt"], row["completion"]) for row in rows("sentiment-prompts", split)]
        assert prompts == [(f"Review: {text}\nSentiment:", f" {label}") for text, label in plain]
        pairs = [(row["input"], row["target"]) for row in rows("sentiment-seq2seq", split)]
        assert pairs == [(f"sentiment: {text}", label) for text, label in plain]


def test_t5_tiny_is_made_of_the_same_bytes_again(tmp_path: Path) -> None:
    tiny_t5.make(tmp_path, DATA / "sentiment-seq2seq" / "train.jsonl")
    for path in tmp_path.iterdir():
        assert sha256(path) == sha256(MODELS / "t5-tiny" / path.name), path.name


def test_t5_tiny_reads_and_writes_as_a_t5_does() -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "t5-tiny")
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    ids = tokenizer("A warm, funny film \N{SNOWMAN}").input_ids
    assert ids[-1] == 1 and ids[-2] == 2 and 2 not in ids[:-2]
    model = AutoModelForSeq2SeqLM.from_pretrained(MODELS / "t5-tiny")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generate(**tokenizer("sentiment: fine", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


def test_smollm2_keeps_rope_digits_and_chat_template() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = MODELS / "smollm2-135m-instruct"
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == 100_000 and config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  22") == ["a", "ĠĠ", "2", "2"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(("name", "word"), [("methods.md", "LoRA"), ("recipe.md", "a whole number")])
def test_the_pages_are_what_the_code_says(
    name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    with pytest.raises(EdgePeftError, match="not what the code says"):
        docs.main(["--check"])
    docs.main([])
    docs.main(["--check"])
    made = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(made.replace(word, word.upper(), 1).replace("LORA", "LoRa"), encoding="utf-8")
    with pytest.raises(EdgePeftError, match=f"{name} is not what the code says"):
        docs.main(["--check"])


def test_the_pages_tell_of_every_method_and_of_every_key() -> None:
    made = docs.methods_page()
    for name in base.names():
        assert f"\n## {name}\n" in made and f"(#{name})" in made
    made = docs.recipe_page()
    for field in dataclasses.fields(Recipe):
        [row] = [line for line in made.splitlines() if line.startswith(f"| `{field.name}` |")]
        _, _, kind, default, meaning, _ = (part.strip() for part in row.split("|"))
        assert kind and meaning and (default or getattr(Recipe(model="m", data="d"), field.name) in (None, {}))
    values: dict[str, Any] = {"model": "m", "data": "d"}
    settings = [line for line in made.splitlines() if line.startswith("--set ")]
    for line in settings:
        assign(values, shlex.split(line)[1])
    assert len(settings) > 4 and create(values).variants == ("int8", "int4")


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    done = subprocess.run(
        [sys.executable, "tools/models.py", "t5-tny"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Did you mean t5-tiny?" in done.stderr


@pytest.mark.parametrize("name", ["jetson-orin-nano-8gb", "v100-32gb", "cpu-x86-16gb"])
def test_a_profile_that_the_probe_writes_is_the_device_it_found(name: str, tmp_path: Path) -> None:
    """Its interconnect and the processor beside it too, which are not measured."""
    known = hardware.load(name)
    (tmp_path / f"{name}.toml").write_text(probe.as_toml(known), encoding="utf-8")
    assert hardware.load(str(tmp_path / f"{name}.toml")) == known
