"""The order of examples, and what is held out: functions of the seed, exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import CHATML, byte_level, unigram, word_piece

import edgepeft.data.build
from edgepeft.data import Data, load
from edgepeft.data.batches import microbatches
from edgepeft.data.batches import sample as sampled
from edgepeft.data.partition import partition
from edgepeft.errors import UsageError


def padding(batches: list[list[int]], lengths: np.ndarray[Any, Any]) -> int:
    return sum(int(lengths[batch].max()) * len(batch) for batch in batches) - int(lengths.sum())


def test_an_epoch_is_every_example_once_in_an_order_of_its_own() -> None:
    lengths = np.random.RandomState(0).geometric(0.02, 1003)
    epochs = [microbatches(lengths, 8, seed=3, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(1003))
        assert sorted(len(batch) for batch in batches) == [3] + [8] * 125
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert microbatches(lengths, 8, seed=3, epoch=1) == epochs[1]
    assert microbatches(lengths, 8, seed=4, epoch=1) != epochs[1]
    assert microbatches(lengths, 8, seed=3 + 2**32, epoch=1) == epochs[1]  # the stage after the largest seed's
    unsorted = [list(range(i, min(i + 8, 1003))) for i in range(0, 1003, 8)]
    assert padding(epochs[0], lengths) < 0.2 * padding(unsorted, lengths)
    # Random over the epoch: the long batches are not gathered at one end.
    longest = [int(lengths[batch].max()) for batch in epochs[0]]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


def test_order_never_changes() -> None:
    """A run begun with one version of edgepeft or NumPy is resumed with another: this order is a promise."""
    assert microbatches(np.array([5, 1, 4, 2, 3, 9, 7]), 2, seed=1, epoch=0) == [[4, 3], [1], [5, 6], [0, 2]]
    train, held_out = partition(12, 0.25, seed=1)
    assert (train.tolist(), held_out.tolist()) == ([0, 1, 5, 6, 7, 8, 9, 10, 11], [2, 3, 4])


def test_the_longest_are_moved_and_nothing_else() -> None:
    lengths = np.random.RandomState(1).geometric(0.02, 100)
    plain = microbatches(lengths, 4, seed=0, epoch=0)
    moved = microbatches(lengths, 4, seed=0, epoch=0, longest_at=(3, 0, 99))
    assert sorted(plain) == sorted(moved)
    assert sum(a != b for a, b in zip(plain, moved, strict=True)) <= 4
    padded = [int(lengths[batch].max()) * len(batch) for batch in moved]
    assert [padded[3], padded[0]] == sorted(padded, reverse=True)[:2]
    assert microbatches(np.array([3]), 4, seed=0, epoch=0, longest_at=(3, 0)) == [[0]]


def test_a_sample_is_of_the_whole_file() -> None:
    assert sampled(5, 5, seed=1) == sampled(5, 9, seed=1) == [0, 1, 2, 3, 4]
    chosen = sampled(10_000, 100, seed=1)
    assert chosen == sampled(10_000, 100, seed=1) != sampled(10_000, 100, seed=2)
    assert chosen == sorted(set(chosen)) and len(chosen) == 100
    assert 3_500 < np.mean(chosen) < 6_500 and sampled(12, 4, seed=0) == [4, 6, 10, 11]


@pytest.mark.parametrize(
    ("examples", "fraction", "count"), [(2, 0.1, 1), (100, 0.1, 10), (3, 0.99, 2), (1000, 0.2, 200)]
)
def test_partition_is_whole_and_depends_on_the_seed_alone(examples: int, fraction: float, count: int) -> None:
    train, held_out = partition(examples, fraction, seed=5)
    assert sorted([*train, *held_out]) == list(range(examples)) and len(held_out) == count
    assert train.tolist() == sorted(train) and held_out.tolist() == sorted(held_out)
    again = partition(examples, fraction, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip((train, held_out), again, strict=True))
    if examples >= 100:
        assert not np.array_equal(held_out, partition(examples, fraction, seed=6)[1])


def test_partition_trains_on_every_class() -> None:
    codes = np.array([0] * 20 + [1, 2, 3])
    for seed in range(30):
        train, held_out = partition(23, 0.3, seed=seed, codes=codes)
        assert set(codes[train]) == {0, 1, 2, 3} and len(held_out) > 0
        assert sorted([*train, *held_out]) == list(range(23))
    with pytest.raises(UsageError, match="With 1 examples"):
        partition(1, 0.1, seed=0)
    with pytest.raises(UsageError, match="With 3 examples"):
        partition(3, 0.5, seed=0, codes=np.array([0, 1, 2]))


def test_inputs_without_equals_do_not_change_what_is_held_out() -> None:
    """What a run of an earlier version held out is held out still."""
    inputs = np.random.RandomState(0).permutation(1003)
    for codes in (None, np.arange(1003) % 700):
        plain, aware = (partition(1003, 0.1, seed=7, codes=codes, inputs=given) for given in (None, inputs))
        assert all(np.array_equal(a, b) for a, b in zip(plain, aware, strict=True))


@pytest.mark.parametrize(
    ("sizes", "fraction", "held"),
    [
        ([2] * 50, 0.1, 10),
        ([1] * 40 + [3] * 20, 0.25, 25),
        ([2] * 5, 0.1, 2),  # a pair is more than the one example asked for, and the least there is
        ([500, 500], 0.1, 500),
        ([990, 4, 6], 0.1, 10),
        ([60], 0.1, 6),  # all are equal: held out as if none were
    ],
)
def test_equal_inputs_are_never_on_both_sides(sizes: list[int], fraction: float, held: int) -> None:
    inputs = np.random.RandomState(3).permutation(np.repeat(np.arange(len(sizes)) * 1000 - 7, sizes))
    for seed in range(20):
        train, held_out = partition(len(inputs), fraction, seed=seed, inputs=inputs)
        assert sorted([*train, *held_out]) == list(range(len(inputs))) and len(train) > 0
        assert len(sizes) == 1 or not set(inputs[train]) & set(inputs[held_out])
        assert len(held_out) == held
        again = partition(len(inputs), fraction, seed=seed, inputs=inputs)
        assert all(np.array_equal(a, b) for a, b in zip((train, held_out), again, strict=True))


def test_a_class_goes_to_training_with_all_that_equals_its_inputs() -> None:
    inputs = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    codes = np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0])  # of class 1 there is one example, beside an equal one of class 0
    for seed in range(30):
        train, held_out = partition(10, 0.4, seed=seed, codes=codes, inputs=inputs)
        assert set(codes[train]) == {0, 1} and not set(inputs[train]) & set(inputs[held_out])


@pytest.mark.parametrize(
    ("rows", "make"),
    [
        ([{"text": f"fox {i // 2}", "label": i % 2} for i in range(40)], word_piece),
        ([{"prompt": f"fox {i // 2}", "completion": f"dog {i}"} for i in range(40)], byte_level),
        ([{"input": f"fox {i // 2}", "target": f"dog {i}"} for i in range(40)], unigram),
        (
            [
                {"messages": [{"role": "user", "content": f"fox {i // 2}"}, {"role": "assistant", "content": f"{i}"}]}
                for i in range(40)
            ],
            lambda: byte_level(chat_template=CHATML),
        ),
    ],
)
def test_examples_of_one_input_are_held_out_together(tmp_path: Path, rows: list[dict[str, Any]], make: Any) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = load(str(source), tokenizer=make(), cache=tmp_path / "cache", max_tokens=64)
    lines = [int(e.where.rpartition(" ")[2]) - 1 for e in data.validation.examples(range(len(data.validation)))]
    assert len(lines) == 4 and len({line // 2 for line in lines}) == 2  # two pairs
    assert data.repeated == 0 and "training data too" not in data.described(64)

    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in (rows[1], rows[7])), encoding="utf-8")
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]), encoding="utf-8")
    for _ in range(2):  # built, and found again
        data = load(str(train), tokenizer=make(), cache=tmp_path / "cache", max_tokens=64, validation=str(held))
        assert data.repeated == 1
        assert data.described(64).endswith("; 1 of validation have their input in the training data too")


def sample(tmp_path: Path, tokenizer: Any, count: int = 60, **options: Any) -> Data:
    rng = np.random.RandomState(0)
    text = ["the fox " * n for n in rng.randint(1, 12, 2 * count)]
    rows = {
        "classification": [{"text": a, "label": i % 2} for i, a in enumerate(text[:count])],
        "seq2seq": [{"input": a, "target": b} for a, b in zip(text[:count], text[count:], strict=True)],
        "causal-lm": [{"prompt": a, "completion": b} for a, b in zip(text[:count], text[count:], strict=True)],
    }[options.get("task", "seq2seq")]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(str(source), tokenizer=tokenizer, cache=tmp_path / "cache", max_tokens=64, **options)


@pytest.mark.parametrize(
    ("task", "make"), [("classification", word_piece), ("seq2seq", unigram), ("causal-lm", byte_level)]
)
def test_the_microbatch_of_most_tokens_is_the_one_that_is_moved(tmp_path: Path, task: str, make: Any) -> None:
    train = sample(tmp_path, make(), task=task).train
    for size in (1, 4):
        collated = [train.collate(batch) for batch in train.microbatches(size, seed=0, epoch=0, longest_at=(0,))]
        tokens = [
            sum(batch[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch)
            for batch in collated
        ]
        assert tokens[0] == max(tokens)


def test_a_long_target_of_a_short_input_is_met_at_once(tmp_path: Path) -> None:
    rows = [{"input": "fox " * (1 + i % 9), "target": "dog"} for i in range(60)]
    rows[37]["target"] = "the fox " * 40
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "validation.jsonl").write_text(json.dumps({"input": "fox", "target": "dog"}), encoding="utf-8")
    train = load(str(tmp_path), tokenizer=unigram(), cache=tmp_path / "cache", max_tokens=64).train
    for seed in range(5):
        first, *others = train.microbatches(4, seed=seed, epoch=0, longest_at=(0,))
        rest = sum(others, [])
        assert 37 in first and sorted([*first, *rest]) == list(range(60))
        beside = [i for i in first if i != 37]  # grouped by all that is read: it stands with the longest inputs
        assert train.lengths[beside].min() >= train.lengths[rest].max() > train.lengths[37]


def test_second_load_reads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(chat_template=CHATML)
    first = sample(tmp_path, tokenizer, task="causal-lm")

    def written() -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*")}

    before = written()
    tokenizer("padded and cut", padding="max_length", truncation=True, max_length=2)  # leaves its mark on the tokenizer
    second = sample_again(tmp_path, tokenizer)
    assert written() == before
    assert second.train.examples(range(9)) == first.train.examples(range(9))
    assert np.array_equal(second.validation.lengths, first.validation.lengths)

    tokenizer.add_tokens(["fox"])
    sample_again(tmp_path, tokenizer)
    sample_again(tmp_path, tokenizer, seed=1)
    sample_again(tmp_path, tokenizer, max_tokens=32)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    source = tmp_path / "a.jsonl"
    os.utime(source, ns=(0, 0))
    sample_again(tmp_path, tokenizer)
    assert len(list((tmp_path / "cache").iterdir())) == 5


def sample_again(tmp_path: Path, tokenizer: Any, **options: Any) -> Data:
    """What :func:`sample` wrote, loaded from there without writing it again."""
    settings = {"max_tokens": 64, **options}
    return load(str(tmp_path / "a.jsonl"), tokenizer=tokenizer, cache=tmp_path / "cache", **settings)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = unigram()
    with monkeypatch.context() as patch:
        patch.setattr(edgepeft.data.build, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sample(tmp_path, tokenizer, task="seq2seq")
    assert list((tmp_path / "cache").iterdir()) == []
    data = sample(tmp_path, tokenizer, task="seq2seq")
    assert len(data.train) + len(data.validation) == 60
