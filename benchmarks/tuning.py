"""What the methods are compared on: three models, each with a task on real text, a budget and the rows of its table."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import job
from edgepeft.files import atomic_directory
from edgepeft.methods import base

STATE = Path(os.environ.get("EDGEPEFT_CACHE", Path.home() / ".cache" / "edgepeft")) / "benchmark-methods"
HEAD_ONLY = "benchmarks.head_only"
SLOW = ("fish_mask", "intrinsic_said", "adamix", "prompt_tuning", "spot", "ipt")  # come last
LOFTQ = 5  # rounds, the most that the paper tries (arXiv 2310.08659)
DEV = 128  # validation examples that choose the learning rate
SCORED = 256  # others, on which the score is taken

Text = tuple[str, str]  # a text and the word for its class


@dataclass(frozen=True)
class Row:
    """A line of a table: a method with options other than its defaults, on a precision.

    Attributes:
        why: why these options.
        known_as: what it is called in the table where that is not the method's name.
    """

    method: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    known_as: str = ""

    @property
    def name(self) -> str:
        plain = self.known_as or self.method.rpartition(".")[2]
        return f"{plain}-nf4" if self.precision == "nf4" else plain


@dataclass(frozen=True)
class Bench:
    """A model, its task and what a run may cost.

    Attributes:
        shape: an example of a data set from a text, the word for its class, and the number of the task.
        classes: gives texts the words for their classes; those of ``tools/data.py`` are as they are.
        train: which rows of the training file.
        updates, batch: of every run, whatever the method; ``seconds`` is what a run may take at most.
        scale: of all learning rates; a narrow model wants higher ones.
        options: for methods whose defaults do not suit the model or the budget, with the reason.
    """

    name: str
    title: str
    model: Path
    task: str
    shape: Callable[[str, str, int], dict[str, str]]
    classes: Callable[[Sequence[Text]], list[Text]]
    train: slice
    updates: int
    batch: int
    tokens: int
    precision: str
    seconds: int
    scale: float = 1.0
    options: Mapping[str, tuple[Mapping[str, Any], str]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its runs, data and prompts are kept."""
        return STATE / self.name

    @property
    def made_here(self) -> bool:
        """Whether its model is trained by the benchmark: other machines come to other weights, and to other runs."""
        return self.model.is_relative_to(self.folder)

    def rows(self) -> list[Row]:
        """Full tuning, every method, and on NF4 those that are most used there."""
        names = sorted(base.names(), key=lambda name: (name != "full", name in SLOW))
        if self.task == "classification":
            names.insert(0, HEAD_ONLY)
        plain = [Row(name, self.precision, *self._options(name)) for name in names]
        packed = [Row(name, "nf4", *self._options(name)) for name in ("lora", "lst")]
        loftq = Row("lora", "nf4", {"loftq": LOFTQ}, f"lora, begun by {LOFTQ} rounds of LoftQ", "loftq")
        return [*plain, *packed, loftq]

    def _options(self, name: str) -> tuple[Mapping[str, Any], str]:
        prompts = [str(self.folder / "prompts" / other) for other in OTHERS]
        if name == "spot":
            return {"source": prompts[0]}, "its prompt comes from the task of swapped words"
        if name == "ipt":
            return {"prompts": prompts}, "two prompts, from the tasks of swapped words and of length"
        return self.options.get(name, ({}, ""))

    def data(self, other: str | None = None) -> Path:
        """A folder with ``train.jsonl``, ``validation.jsonl`` (development) and ``score.jsonl``; made when missing.

        Args:
            other: one of ``OTHERS`` instead of the bench's own task.
        """
        home = self.folder / "data" / (other or "sentiment")
        if not home.is_dir():
            number = [None, *OTHERS].index(other)
            classes = OTHERS[other] if other else self.classes
            held_out = classes(texts("validation"))
            parts = {
                "train": classes(texts("train"))[self.train],
                "validation": held_out[:DEV],
                "score": held_out[DEV : DEV + SCORED],
            }
            with atomic_directory(home) as folder:
                for name, rows in parts.items():
                    lines = [json.dumps(self.shape(*row, number), ensure_ascii=False) + "\n" for row in rows]
                    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return home


def texts(split: str) -> list[Text]:
    """The texts of a split of the sentiment data, each with its label."""
    lines = (job.TEXT.parent / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["text"], row["label"]) for row in map(json.loads, lines)]


def comma(rows: Sequence[Text]) -> list[Text]:
    """Whether there is a comma in a text: a small T5 learns that from scratch in minutes, but not sentiment."""
    return [(text, "with" if "," in text else "without") for text, _ in rows]


def _swapped(rows: Sequence[Text]) -> list[Text]:
    """In half of the texts, two neighbouring words trade places: BShift of Conneau et al. (arXiv 1805.01070)."""
    found = []
    for number, (text, _) in enumerate(rows):
        words, chance = text.split(), random.Random(number)
        if swap := len(words) > 1 and chance.random() < 0.5:
            at = chance.randrange(len(words) - 1)
            words[at : at + 2] = words[at + 1], words[at]
        found.append((" ".join(words), "swapped" if swap else "normal"))
    return found


def _length(rows: Sequence[Text]) -> list[Text]:
    """Whether a text has more words than half of them: SentLen of the same paper, with two bins."""
    middle = statistics.median(len(text.split()) for text, _ in rows)
    return [(text, "long" if len(text.split()) > middle else "short") for text, _ in rows]


OTHERS: Mapping[str, Callable[[Sequence[Text]], list[Text]]] = {"swapped": _swapped, "length": _length}
"""Tasks on the same texts whose prompts SPoT and IPT start from."""


def _labelled(text: str, word: str, number: int) -> dict[str, str]:
    return {"text": text, "label": word}


def _asked(text: str, word: str, number: int) -> dict[str, str]:
    return {"input": f"{('comma', 'order', 'length')[number]}: {text}", "target": word}


def _completed(text: str, word: str, number: int) -> dict[str, str]:
    question = ("Sentiment", "Word order", "Length")[number]
    return {"prompt": f"Review: {text}\n{question}:", "completion": f" {word}"}


BENCHES = {
    bench.name: bench
    for bench in (
        Bench(
            name="minilm",
            title="MiniLM-L6 (22.7 M), sentiment as classification",
            model=job.ROOT / "models" / "minilm-l6",
            task="classification",
            shape=_labelled,
            classes=list,
            train=slice(None),
            updates=128,
            batch=16,
            tokens=32,
            precision="bf16",
            seconds=900,
        ),
        Bench(
            name="t5",
            title="a T5 of 1.4 M trained from scratch, now asked for other words",
            model=STATE / "t5" / "model",
            task="seq2seq",
            shape=_asked,
            classes=comma,
            train=slice(6000, None),
            updates=100,
            batch=16,
            tokens=48,
            precision="fp32",
            seconds=600,
            scale=3.0,
            options={"galore": ({"rank": 32}, "its matrices are no larger than the default of 128")},
        ),
        Bench(
            name="smollm2",
            title="SmolLM2-135M-Instruct, sentiment as completion",
            model=job.MODEL,
            task="causal-lm",
            shape=_completed,
            classes=list,
            train=slice(None),
            updates=24,
            batch=8,
            tokens=48,
            precision="bf16",
            seconds=1800,
            options={"fish_mask": ({"examples": 64}, "the examples of eight updates instead of 128")},
        ),
    )
}
