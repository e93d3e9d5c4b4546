"""Which columns make which task, and what is advised when none: flags that work when they are followed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgepeft import recipe
from edgepeft.data.columns import Layout, needed
from edgepeft.data.read import rows
from edgepeft.data.recognise import recognise
from edgepeft.errors import UsageError

REVIEW = "a film that is long and good"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("found", "task", "columns", "expected"),
    [
        ("text label", None, {}, "classification text label"),
        ("prompt completion id", None, {}, "causal-lm prompt completion"),
        ("input target", "seq2seq", {}, "seq2seq input target"),
        ("messages", None, {}, "causal-lm messages"),
        ("text", "causal-lm", {}, "causal-lm text"),
        ("review stars", None, {"text": "review", "label": "stars"}, "classification review stars"),
        ("text stars", None, {"label": "stars"}, "classification text stars"),
        ("prompt completion", "seq2seq", {"input": "prompt", "target": "completion"}, "seq2seq prompt completion"),
        ("text label", "causal-lm", {"text": "text"}, "causal-lm text"),
        ("prompt completion messages", None, {"messages": "messages"}, "causal-lm messages"),
        ("text label input target", "seq2seq", {}, "seq2seq input target"),
    ],
)
def test_columns_recognised(found: str, task: str | None, columns: Mapping[str, str], expected: str) -> None:
    layout = recognise("a.csv", dict.fromkeys(found.split(), "a"), task=task, columns=columns)
    assert " ".join([layout.task, *layout.columns]) == expected


@pytest.mark.parametrize(
    ("found", "task", "columns", "message"),
    [
        ("text", None, {}, "does not fit any task.\na.csv has the columns text.\nAccepted: text . label"),
        ("body mark", None, {}, "does not fit any task.\na.csv has the columns body, mark"),
        ("prompt completion messages", None, {}, "more than one layout: prompt . completion .* and messages"),
        ("text label", "seq2seq", {}, "does not fit the task seq2seq.\n.*text . label for classification"),
        ("text label", "causal-lm", {}, "does not fit the task causal-lm"),
        ("text", "classification", {}, "does not fit the task classification"),
        ("text label", "translation", {}, "no task 'translation'"),
        ("review stars", None, {"text": "reviews", "label": "stars"}, "no column 'reviews'.\n.*\n.*review?"),
        ("review stars", None, {"txt": "review"}, "no field 'txt'.*\n.*\n.*text?"),
        ("text label stars", None, {"label": "stars", "target": "label"}, "does not fit any task"),
    ],
)
def test_columns_refused(found: str, task: str | None, columns: Mapping[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recognise("a.csv", dict.fromkeys(found.split(), "a"), task=task, columns=columns)


def followed(line: str, row: Mapping[str, Any], task: str | None, columns: Mapping[str, str]) -> Layout:
    """What is recognised when the flags in a line of advice are added to those that were given."""
    values: dict[str, Any] = {"task": task, "columns": dict(columns)}
    words = shlex.split(line.rpartition("instead: ")[2].partition(" (")[0])
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--set":
            recipe.assign(values, value)
        elif flag == "--task":
            values["task"] = value
    return recognise("a.csv", row, **values)


@pytest.mark.parametrize(
    ("row", "task", "columns", "advice", "expected"),
    [
        ({"review": REVIEW, "sentiment": "pos"}, None, {}, "columns.text=review --set columns.label=sent", "review"),
        ({"sentiment": "pos", "review": REVIEW}, None, {}, "columns.text=review --set columns.label=sent", "review"),
        (
            {"review": REVIEW, "sentiment": "pos"},
            None,
            {"text": "review"},
            "columns.text is given; classification also needs label: --set columns.label=sentiment",
            "review sentiment",
        ),
        (
            {"question": "a", "answer": "b", "topic": "c"},
            None,
            {"completion": "answer"},
            "columns.completion is given; causal-lm also needs prompt: --set columns.prompt=question",
            "question answer",
        ),
        ({"Text": REVIEW, "Label": "1"}, None, {}, "--set columns.text=Text --set columns.label=Label", "Text Label"),
        ({" text": REVIEW, "true": 1}, None, {}, "--set 'columns.text=\" text\"'", " text true"),
        ({"text": REVIEW}, None, {}, "Add --task causal-lm", "text"),
        ({"id": "1", "text": REVIEW}, None, {}, "Add --task causal-lm", "text"),
        ({"body": REVIEW}, None, {}, "Add --task causal-lm --set columns.text=body", "body"),
        ({"body": REVIEW}, None, {"text": "body"}, "no other column is left: add it, .* --task causal-lm", "body"),
        ({"question": "a", "answer": "b"}, None, {}, "--set columns.prompt=question", "question answer"),
        ({"prompt": "a", "answer": "b"}, None, {}, "Add --set columns.completion=answer", "prompt answer"),
        ({"instruction": "a", "output": "b"}, None, {}, "--set columns.prompt=instruction", "instruction output"),
        ({"de": "ja", "en": "yes"}, "seq2seq", {}, "--set columns.input=de --set columns.target=en", "de en"),
        ({"conversations": CHAT}, None, {}, "--set columns.messages=conversations", "conversations"),
        ({"text": "a", "label": "b"}, "seq2seq", {}, "columns.input=text --set columns.target=label", "text label"),
    ],
)
def test_advice_works_when_it_is_followed(
    row: dict[str, Any], task: str | None, columns: dict[str, str], advice: str, expected: str
) -> None:
    with pytest.raises(UsageError, match="does not fit") as refusal:
        recognise("a.csv", row, task=task, columns=columns)
    assert re.search(advice, refusal.value.remedy)
    layout = followed(refusal.value.remedy, row, task, columns)
    assert " ".join(layout.columns).startswith(expected)


def test_where_names_say_nothing_each_task_has_its_flags() -> None:
    row = {"a": "1", "b": REVIEW}
    with pytest.raises(UsageError, match="does not fit") as refusal:
        recognise("a.csv", row, task=None, columns={})
    lines = refusal.value.remedy.splitlines()[1:]
    assert [followed(line, row, None, {}) for line in lines] == [
        Layout("classification", ("text", "label"), ("b", "a")),
        Layout("causal-lm", ("prompt", "completion"), ("a", "b")),
        Layout("seq2seq", ("input", "target"), ("a", "b")),
    ]


def test_names_that_are_left_are_told() -> None:
    with pytest.raises(UsageError, match=r"needs label: --set columns.label=NAME, where NAME is one of b, c"):
        recognise("a.csv", {"a": REVIEW, "b": "1", "c": "2"}, task=None, columns={"text": "a"})
    with pytest.raises(UsageError, match="columns.label and columns.target are given; name the columns of one task"):
        recognise("a.csv", {"a": "1", "b": "2"}, task=None, columns={"label": "a", "target": "b"})


@pytest.mark.parametrize(
    ("examples", "task", "columns", "named", "expected"),
    [
        (
            [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "b"}],
            None,
            {},
            "the shape of Alpaca: instruction, input, output",
            [{"prompt": "Add.\n1 2\n", "completion": "3"}, {"prompt": "Hi\n", "completion": "b"}],
        ),
        (
            [{"instruction": "Add.", "input": "1 2", "output": "3"}],
            "seq2seq",
            {"target": "output"},  # which alone would be input + target, and leave out the instruction
            "the shape of Alpaca",
            [{"input": "Add.\n1 2\n", "target": "3"}],
        ),
        ([{"conversations": SHAREGPT}], None, {}, "'conversations' has the shape of ShareGPT", [{"messages": CHAT}]),
        (
            [{"conversations": SHAREGPT[-2:], "system": "Be brief."}, {"conversations": SHAREGPT, "system": ""}],
            None,
            {},
            "the shape of ShareGPT",
            [{"messages": [{"role": "system", "content": "Be brief."}, *CHAT[-2:]]}, {"messages": CHAT}],
        ),
        ([{"dialogue": SHAREGPT}], None, {"messages": "dialogue"}, "line 1: 'dialogue' has the", [{"messages": CHAT}]),
    ],
)
def test_shapes_of_others_are_named_with_a_command_that_rewrites_them(
    examples: list[dict[str, Any]],
    task: str | None,
    columns: dict[str, str],
    named: str,
    expected: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "OLD.jsonl"
    path.write_text("".join(json.dumps(example) + "\n\n" for example in examples), encoding="utf-8-sig")
    with pytest.raises(UsageError, match=named) as refusal:
        recognise(str(path), examples[0], task=task, columns=columns).example(f"{path}, line 1", examples[0])
    subprocess.run(refusal.value.remedy.splitlines()[1], shell=True, cwd=tmp_path, check=True)
    assert [row for _, row in rows(tmp_path / "NEW.jsonl")] == expected
    assert recognise("NEW.jsonl", expected[0], task=task, columns={}).fields == tuple(expected[0])


def test_columns_of_such_a_shape_may_all_be_named() -> None:
    row = {"instruction": "a", "input": "", "output": "b", "messages": CHAT}
    columns = {"prompt": "instruction", "completion": "output"}
    assert recognise("a.csv", row, task=None, columns=columns).columns == ("instruction", "output")
    assert recognise("a.csv", row, task=None, columns={}).columns == ("messages",)


def test_what_a_task_needs_is_said_in_words() -> None:
    assert needed("classification") == "text and label"
    assert needed("causal-lm") == "prompt and completion, messages or text"
