"""ONNX graphs against the torch model they were made from: logits, metric, generated tokens, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepeft.cross_entropy import chunks
from edgepeft.ledger import Row
from edgepeft.runtime import decode
from edgepeft.runtime.sessions import Graph

FP32_TOLERANCE = 1e-4  # relative: the same arithmetic in another order; measured exports are at 7e-7 to 3e-6
FP32_SAME_TOKENS = 0.5  # two likeliest tokens may tie, and all after them differ; a wrong cache spares no prompt
LOST_GAIN, LOST, FLIPPED = 0.1, 0.02, 2  # what a variant may lose: see ``keeps_fine_tune``
PREFILL, DECODE = 32, 24  # tokens of the latency measurement
CLASSIFIED = 64

Arrays = Mapping[str, NDArray[Any]]
Graphs = Mapping[str, Graph]


@dataclass(frozen=True)
class Comparison:
    """Metrics of the graphs on some batches, and the largest difference of logits relative to the largest, or to 1."""

    metrics: dict[str, float]
    deviation: float


def target_logits(graphs: Graphs, batch: Arrays) -> NDArray[np.float32]:
    """Logits of the graphs where the batch has targets: (targets, classes or vocabulary). A batch is as in training.

    Texts are read one by one, as on a device: the logits of a whole batch may need more memory than the model.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if "labels" in batch:
        texts = [row[real > 0][None] for row, real in zip(ids, mask, strict=True)]
        feeds = [{"input_ids": text, "attention_mask": np.ones_like(text)} for text in texts]
        return np.concatenate([graphs["model"].run(feed)["logits"].numpy() for feed in feeds])
    predicting = batch.get("decoder_input_ids", ids)
    rows, positions = np.divmod(batch["target_positions"], predicting.shape[1])
    found = []
    for row in range(len(ids)):
        text, wanted = ids[row][mask[row] > 0], positions[rows == row]
        if "encoder" in graphs:
            found.append(
                decode.seq2seq_logits(graphs["encoder"], graphs["decoder"], text, predicting[row], wanted),
            )
        else:
            found.append(decode.causal_logits(graphs["model"], text, wanted))
    return np.concatenate(found)


def compare(graphs: Graphs, batches: Sequence[Arrays], reference: Callable[[int], NDArray[np.float32]]) -> Comparison:
    """Hold the graphs against ``reference(i)``, the logits another artefact gives for batch ``i``. One batch at a time.

    Logits that are not numbers count as wrong answers, and make the loss and the deviation NaN.
    """
    loss, right, count = 0.0, 0, 0
    differences, magnitudes = [], []
    name = "accuracy"
    for index, batch in enumerate(batches):
        wanted = batch["labels"] if "labels" in batch else batch["target_ids"]
        name = "accuracy" if "labels" in batch else "token_accuracy"
        logits, other = target_logits(graphs, batch), reference(index)
        differences.append(np.abs(logits - other).max())
        magnitudes.append(np.abs(other).max())
        for part in chunks(len(wanted), logits.shape[-1]):
            some, target = logits[part].astype(np.float64), wanted[part]
            right += int(((some.argmax(-1) == target) & np.isfinite(some).all(-1)).sum())
            some -= some.max(-1, keepdims=True)
            loss += float((np.log(np.exp(some).sum(-1)) - np.take_along_axis(some, target[:, None], 1)[:, 0]).sum())
        count += len(wanted)
    # A new head's logits are all near 0, and so near to rounding. Python's max would lose a NaN.
    deviation = float(np.max(differences) / np.maximum(1.0, np.max(magnitudes)))
    return Comparison({"loss": loss / count, name: right / count}, deviation)


def same_tokens(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """The share of generated tokens that are equal up to the first difference, over all prompts."""
    equal = total = 0
    for one, other in zip(expected, found, strict=True):
        total += max(len(one), len(other))
        agree = [a == b for a, b in zip(one, other, strict=False)]
        equal += agree.index(False) if False in agree else len(agree)
    return equal / total if total else 1.0


def generate(graphs: Graphs, prompt: Sequence[int], tokens: int, stops: Sequence[int], start: int | None) -> list[int]:
    """Greedy tokens after one prompt, the stop token included."""
    ids = np.array([prompt], np.int64)
    return decode.greedy(graphs, ids, np.ones_like(ids), tokens, stops, start)[0].tolist()


def speed(graphs: Graphs, task: str, start: int | None, *, runs: int = 5) -> tuple[float, float | None]:
    """Milliseconds to classify 64 tokens or to read a prompt of 32, and tokens a second generated after it: medians."""
    if task == "classification":
        ids = np.full((1, CLASSIFIED), 5, np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return float(np.median([_seconds(lambda: graphs["model"].run(feed)) for _ in range(runs + 1)][1:])) * 1e3, None
    ids = np.full((1, PREFILL), 5, np.int64)
    prefill, whole = [], []
    for _ in range(runs + 1):
        prefill.append(_seconds(lambda: decode.greedy(graphs, ids, np.ones_like(ids), 1, (), start)))
        whole.append(_seconds(lambda: decode.greedy(graphs, ids, np.ones_like(ids), 1 + DECODE, (), start)))
    first = float(np.median(prefill[1:]))
    return first * 1e3, DECODE / max(float(np.median(whole[1:])) - first, 1e-9)


def same_function(row: Row) -> str:
    """Why a row's graph, unquantised, is not the model it was made from, or an empty string when it is."""
    deviation = float("nan") if row.deviation is None else row.deviation
    if not deviation <= FP32_TOLERANCE:  # also refuses NaN
        return f"Logits differ by {deviation:.2g} of the largest; up to {FP32_TOLERANCE:g} is rounding."
    if row.same_tokens is not None and row.same_tokens < FP32_SAME_TOKENS:
        return f"Of the generated tokens only {row.same_tokens:.0%} are the same: its key-value cache is wrong."
    return ""


def keeps_fine_tune(task: str, row: Row, tuned: Row, base: Row | None, examples: int) -> str:
    """Why an artefact lost the fine-tune, or an empty string when it did not.

    By accuracy for classifiers and by loss for the others, it may lose a tenth of what training gained over the untuned
    model, or 2 % of the metric where that is more. Of a classifier two examples may go, which is chance.

    Args:
        examples: on how many it was measured.
    """
    if not np.isfinite(list(row.metrics.values())).all():
        return "Its outputs are not numbers."
    name, sign = ("accuracy", 1) if task == "classification" else ("loss", -1)
    gained = 0.0 if base is None else sign * (tuned.metrics[name] - base.metrics[name])
    lost = sign * (tuned.metrics[name] - row.metrics[name])
    chance = FLIPPED / examples if task == "classification" else 0.0
    allowed = max(LOST_GAIN * gained, LOST * abs(tuned.metrics[name]), chance)
    if lost <= allowed + 1e-9:  # accuracies are quotients
        return ""
    return f"{name} {row.metrics[name]:.4f} against {tuned.metrics[name]:.4f}: more than {allowed:.4f} is lost."


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
