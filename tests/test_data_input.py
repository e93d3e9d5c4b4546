"""What data may look like, and what is said when it does not."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_tokenizers import CHATML, byte_level, unigram, word_piece

from edgepeft.data import Data, load
from edgepeft.data.read import rows
from edgepeft.data.source import sources
from edgepeft.errors import UsageError

REVIEWS = [{"text": f"film {i} is {'wonderful' if i % 2 else 'terrible'}", "label": "ny"[i % 2]} for i in range(20)]


def write_jsonl(path: Path, examples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def reviews(tmp_path: Path, source: str | Path, **options: Any) -> Data:
    return load(str(source), tokenizer=word_piece(), cache=tmp_path / "cache", max_tokens=32, **options)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    examples = [{"text": 'a "quoted", line\nand another', "label": "\u6f22"}, {"text": "b", "label": "2"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", examples)
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(examples)
    with (tmp_path / "a.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["text", "label"], *(example.values() for example in examples)])
    pq.write_table(pa.Table.from_pylist(examples), tmp_path / "a.parquet")
    for path in (jsonl, tmp_path / "a.csv", tmp_path / "a.tsv", tmp_path / "a.parquet"):
        assert [row for _, row in rows(path)] == examples
    # A quoted field may span lines: the row stands where it begins.
    assert [where for where, _ in rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv, line {n}" for n in (2, 4)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b", \n', "a.jsonl, line 3: the row is malformed"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n["b", 1]\n', "line 2: .*\n.*found a list"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xff", "label": 1}\n', "line 2: .*\n.*UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "a.jsonl, line 2: 'label' is missing"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "  ", "label": 1}\n', "a.jsonl, line 2: 'text' is empty"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', "line 2: 'label' is empty"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n', "line 2: 'text' should be text"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 0.5}\n',
            "line 1: 'label' should be text or a whole number.\n.*\n.*to predict",
        ),
        (
            "a.jsonl",
            b'{"text": "a \\ud83d\\ude00", "label": 1}\n{"text": "good \\ud83d here", "label": 1}\n',
            r"a.jsonl, line 2: the row is malformed.\nIt has '\\ud83d', half of a character",
        ),
        ("a.jsonl", b'{"text": "a", "label": 1, "\\udc00": 2}\n', "a.jsonl, line 1: the row is malformed"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no data"),
        ("a.csv", b"text,label\n", "a.csv holds no data"),
        ("a.csv", b"text,label\na,1\nb\n", "a.csv, line 3: the row is malformed.\nIt has 1 fields"),
        ("a.csv", b'text,label\na,1\n"b,1\n', "a.csv, line 3: the row is malformed"),
        ("a.tsv", b"text\tlabel\na\t1\nb\n", "a.tsv, line 3: the row is malformed.\nIt has 1 fields"),
        ("a.tsv", b"text,label\na,1\n", "line 1: the columns are separated by ','.\n.*\nRename it to .*/a.csv"),
        ("a.csv", b"text\tlabel\na\t1\n", r"line 1: the columns are separated by '\\t'.\n.*\nRename it to .*/a.tsv"),
        ("a.csv", b"text,text\na,1\n", "a.csv, line 1: .*\nThe header must name every column once"),
        ("a.csv", b"text,label\na,\n", "a.csv, line 2: 'label' is empty"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet cannot be read"),
        ("a.txt", b"text", "not a data file.*\n.*ends in .txt"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n' * 3, "has only the label '1'"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n', "has only the label '1'"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a", "label": 2}\n', "With 2 examples there is none"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the roles of 'messages' are user"),
        ("a.jsonl", b'{"messages": "hello"}\n', "line 1: 'messages' should be a list"),
        ("a.jsonl", b'{"messages": []}\n', "line 1: 'messages' is empty"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": ""}]}\n', "line 1: message 1 has no text"),
    ],
)
def test_bad_files_are_named_with_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as refusal:
        load(str(tmp_path / name), tokenizer=byte_level(chat_template=CHATML), cache=tmp_path / "cache", max_tokens=16)
    assert refusal.value.exit_code == 2
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.mark.parametrize(
    ("name", "content", "written"),
    [
        ("a b.csv", '\ufeff"text";label\n"a; \u6f22,\nb";1\n', "commas-a b.csv"),
        ("a.csv", 'text|label\n"a; \u6f22,\nb"|1\n', "commas-a.csv"),
        ("a.json", '\ufeff[{"text": "a; \u6f22,\\nb",\n "label": "1"}]', "lines-a.json"),
    ],
)
def test_what_is_written_otherwise_comes_with_a_command_that_rewrites_it(
    tmp_path: Path, name: str, content: str, written: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="separated by|one JSON array") as refusal:
        list(rows(tmp_path / name))
    subprocess.run(refusal.value.remedy.splitlines()[1], shell=True, check=True)
    assert [row for _, row in rows(tmp_path / written)] == [{"text": "a; \u6f22,\nb", "label": "1"}]


@pytest.mark.parametrize(
    ("besides", "message"),
    [
        ({"tool_calls": [{"function": {"name": "f"}}]}, "message 2 has tool_calls, which would be left out"),
        ({"thinking": "Hm."}, "message 2 has thinking, which would be left out"),
        ({"weight": 0}, "message 2 has the weight 0, and would be learned"),
    ],
)
def test_what_a_message_says_besides_its_content_is_not_dropped(
    besides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **besides}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}] * 2)
    with pytest.raises(UsageError, match=f"a.jsonl, line 1: {message}"):
        load(str(source), tokenizer=byte_level(chat_template=CHATML), cache=tmp_path / "cache", max_tokens=64)


def test_a_system_message_in_a_column_of_its_own_is_not_dropped(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = [{"role": "system", "content": "Be brief."}]
    tokenizer = byte_level(chat_template=CHATML)
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat, "system": ""}, {"messages": chat, "system": "Hi."}])
    with pytest.raises(UsageError, match="a.jsonl, line 2: the system message in the column 'system' would be left"):
        load(str(source), tokenizer=tokenizer, cache=tmp_path / "cache", max_tokens=64)
    source = write_jsonl(tmp_path / "b.jsonl", [{"messages": first + chat, "system": "Be brief."}] * 2)
    assert len(load(str(source), tokenizer=tokenizer, cache=tmp_path / "cache", max_tokens=64).train) == 1


def test_tools_in_a_column_of_their_own_are_not_dropped(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = byte_level(chat_template=CHATML)
    rows = [{"messages": chat, "tools": "[]"}, {"messages": chat, "tools": '[{"name": "weather"}]'}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match="a.jsonl, line 2: the tools in the column 'tools' would be left out"):
        load(str(source), tokenizer=tokenizer, cache=tmp_path / "cache", max_tokens=64)


def test_what_a_message_has_besides_and_says_nothing_is_let_be(tmp_path: Path) -> None:
    """Parquet gives every message every key of any."""
    none: dict[str, Any] = {"tool_calls": None, "thinking": "", "name": "x", "weight": None}
    chat = [{"role": "user", "content": "a", **none}, {"role": "assistant", "content": "b", **none, "weight": 1}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}] * 2)
    tokenizer = byte_level(chat_template=CHATML)
    data = load(str(source), tokenizer=tokenizer, cache=tmp_path / "cache", max_tokens=64)
    plain = [{"role": message["role"], "content": message["content"]} for message in chat]
    assert data.train.examples([0])[0].fields["messages"] == plain


def test_a_comma_in_the_name_of_the_only_column_separates_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"text, long"\na\n')
    assert [row for _, row in rows(tmp_path / "a.csv")] == [{"text, long": "a"}]


def test_bad_parquet_row_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", None], "label": [1, 2, 1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="a.parquet, row 3: 'text' is empty"):
        reviews(tmp_path, tmp_path / "a.parquet")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", REVIEWS)
    with pytest.raises(UsageError, match=r"no file or folder .*/tran.jsonl.\n.*train.jsonl"):
        reviews(tmp_path, tmp_path / "tran.jsonl")


def test_hub_data_set_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="data set nobody/nothing:plain could not be loaded.\n.*hub says"):
        reviews(tmp_path, "nobody/nothing:plain")


def test_hub_data_set_with_named_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in the hub's own format, loaded as ``datasets`` loads one: from a folder with a card."""
    folder = tmp_path / "hub" / "films"
    folder.mkdir(parents=True)
    card = {"dataset_info": {"features": [{"name": "text", "dtype": "string"}, {"name": "label", "dtype": {"class_label": {"names": {"0": "bad", "1": "good"}}}}]}}  # fmt: skip # noqa: E501
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": f"film {i}", "label": i % 2} for i in range(20)])
    import datasets

    loading = datasets.load_dataset
    home = str(tmp_path / "hf")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loading(str(folder), config, cache_dir=home))
    data = reviews(tmp_path, "someone/films")
    assert data.labels == ("bad", "good")
    example = data.train.examples([0])[0]
    assert example.where.startswith("someone/films (train), row ")
    assert example.reference == ("bad", "good")[int(example.fields["text"].split()[1]) % 2]


def test_parquet_of_datasets_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    import datasets

    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    features["said"] = [{"by": datasets.Value("string")}]
    numbers = [{"text": f"film {i}", "label": i % 2, "said": []} for i in range(20)]
    made = datasets.Dataset.from_list(numbers, features=datasets.Features(features))
    made.to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for _, row in rows(tmp_path / "a.parquet")] == ["good", "bad"] * 10
    assert reviews(tmp_path, tmp_path / "a.parquet").labels == ("bad", "good")
    made.add_item({"text": "film", "label": -1, "said": []}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="b.parquet, row 21: 'label' is empty"):
        reviews(tmp_path, tmp_path / "b.parquet")


def test_folder_of_save_to_disk_comes_with_a_command_that_rewrites_it(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["n", "y"])
    made = datasets.Dataset.from_list(REVIEWS).cast_column("label", label)
    made.save_to_disk(tmp_path / "a b")
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(tmp_path / "both")
    for name, held_out in (("a b", 2), ("both", 20)):
        with pytest.raises(UsageError, match=f"{name} was written by save_to_disk") as refusal:
            reviews(tmp_path, tmp_path / name)
        subprocess.run(refusal.value.remedy.splitlines()[1], shell=True, check=True)
        data = reviews(tmp_path, tmp_path / f"{name}-parquet")
        assert (data.labels, len(data.validation)) == (("n", "y"), held_out)


def test_validation_data_of_another_name_is_not_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", REVIEWS)
    write_jsonl(folder / "dev.jsonl", REVIEWS[:4])
    with pytest.raises(UsageError, match=r"films has no file validation, but dev.jsonl") as refusal:
        reviews(tmp_path, folder)
    assert f"--set validation={folder / 'dev.jsonl'}" in refusal.value.remedy
    assert len(reviews(tmp_path, folder, validation=str(folder / "dev.jsonl")).validation) == 4
    assert len(reviews(tmp_path, folder / "train.jsonl").validation) == 2
    (folder / "dev.jsonl").rename(folder / "dev.txt")
    assert len(reviews(tmp_path, folder).validation) == 2


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("endings", "refused"),
    [
        ((".jsonl", ".csv"), True),
        ((".jsonl", ".orig.jsonl"), True),
        (("-old.jsonl",), False),
        (("-00000-of-00002.jsonl", "-00001-of-00002.jsonl"), False),
        (("-00000-of-00002-0a1b.jsonl", "-00001-of-00002-2c3d.jsonl"), False),
        (("-00000-of-00002.jsonl", "-00000-of-00002.csv"), True),
        (("-00000-of-00002.jsonl", "-00001-of-00003.jsonl"), True),
        (("-00000-of-00001.jsonl", ".jsonl"), True),
    ],
)
def test_files_of_a_folder_are_the_parts_of_one_set(
    split: str, endings: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    for name in (*(f"{split}{ending}" for ending in endings), "validation.tsv" if split == "train" else "train.tsv"):
        (tmp_path / name).touch()
    if not refused:
        found = dict(zip(("train", "validation"), sources(str(tmp_path), None), strict=True))[split]
        assert found is not None and len(found.key) == len(endings)
        return
    with pytest.raises(UsageError, match=f"more than one {split} file: ") as caught:
        sources(str(tmp_path), None)
    assert all(f"{split}{ending}" in caught.value.fact for ending in endings) and caught.value.remedy


def test_folder_with_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", REVIEWS[:10])
    pq.write_table(pa.Table.from_pylist(REVIEWS[10:18]), tmp_path / "train-00001-of-00002.parquet")
    write_jsonl(tmp_path / "validation.jsonl", REVIEWS[18:])
    data = reviews(tmp_path, tmp_path)
    assert [e.fields["text"] for e in data.train.examples(range(18))] == [r["text"] for r in REVIEWS[:18]]
    assert [e.fields["text"] for e in data.validation.examples(range(2))] == [r["text"] for r in REVIEWS[18:]]
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="has no training data"):
        reviews(tmp_path, tmp_path / "other")
    write_jsonl(tmp_path / "other" / "train.jsonl", REVIEWS)
    with pytest.raises(UsageError, match="has no validation split[\\s\\S]*--set validation=FILE"):
        reviews(tmp_path, tmp_path / "train-00000-of-00002.jsonl", validation=str(tmp_path / "other"))


def test_label_seen_only_in_validation_is_named(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", REVIEWS)
    held_out = write_jsonl(tmp_path / "held.jsonl", [*REVIEWS[:2], {"text": "so so", "label": "maybe"}])
    with pytest.raises(UsageError, match="held.jsonl, line 3: the label 'maybe' is in the validation data only"):
        reviews(tmp_path, train, validation=str(held_out))
    write_jsonl(held_out, [])
    with pytest.raises(UsageError, match="held.jsonl holds no data"):
        reviews(tmp_path, train, validation=str(held_out))


def test_labels_that_look_the_same_are_no_two_classes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*REVIEWS, {"text": "fine", "label": "y "}])
    with pytest.raises(UsageError, match="a.jsonl, line 21: the label 'y ' differs from 'y' in white space alone"):
        reviews(tmp_path, source)
    # In `a, b` each label begins with a space: they are the same ones still.
    source = write_jsonl(tmp_path / "b.jsonl", [{**row, "label": f" {row['label']}"} for row in REVIEWS])
    assert reviews(tmp_path, source).labels == (" n", " y")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i: f"name {i}", "'label' has 60 different values in 60 rows.\nEach would be a class"),
        (lambda i: i, "'label' has 60 different values in 60 rows."),
        (
            lambda i: f"{i // 3 / 7 if i < 12 else i / 7:.2f}",
            "has 52 different values in 60 rows.\n48 of them would be",
        ),
    ],
)
def test_labels_that_are_no_classes_are_told_from_too_few_rows(tmp_path: Path, label: Any, message: str) -> None:
    rows = [{"text": f"film {i}", "label": label(i), "class": i % 2} for i in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=message) as refusal:
        reviews(tmp_path, source)
    assert "number to predict" in refusal.value.remedy
    assert "--set columns.label=NAME, where NAME is one of class" in refusal.value.remedy
    assert reviews(tmp_path, source, columns={"label": "class"}).labels == ("0", "1")
    # With data of its own to validate on, a class may have one example; a number is none however it is validated.
    if isinstance(label(0), str) and label(0) == "0.00":
        with pytest.raises(UsageError, match=message):
            reviews(tmp_path, source, validation=str(source))
    else:
        assert len(reviews(tmp_path, source, validation=str(source)).labels) == 60


def test_few_rows_are_missing_rows(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"film {i}", "label": i} for i in range(9)])
    with pytest.raises(UsageError, match="With 9 examples there is none") as refusal:
        reviews(tmp_path, source)
    assert "--set validation=FILE" in refusal.value.remedy


def test_labels_are_sorted_as_numbers_when_they_are(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": i % 11 + 1} for i in range(50)])
    assert reviews(tmp_path, source).labels == tuple(str(i) for i in range(1, 12))
    source = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": bool(i % 2)} for i in range(50)])
    assert reviews(tmp_path, source).labels == ("false", "true")


def test_settings_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", REVIEWS)
    for options, message in (
        ({"max_tokens": 2}, "At most 2 tokens"),
        ({"max_tokens": 9, "max_target_tokens": 0}, "0 of a target"),
        ({"max_tokens": 9, "validation_fraction": 1.0}, "1.0 is no share"),
    ):
        with pytest.raises(UsageError, match=message):
            load(str(source), tokenizer=word_piece(), cache=tmp_path, **options)
    pairs = write_jsonl(tmp_path / "b.jsonl", [{"input": "a", "target": "b"}] * 3)
    tokenizer = unigram()
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="no pad token"):
        load(str(pairs), tokenizer=tokenizer, cache=tmp_path, max_tokens=9)
    chats = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no eos token"):
        load(str(chats), tokenizer=tokenizer, cache=tmp_path, max_tokens=9)
