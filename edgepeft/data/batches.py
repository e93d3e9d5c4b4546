"""Examples to batches: in which order, and padded to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Numbers = NDArray[np.int64]

GROUP = 50
"""Microbatches in a group. Sorting by length happens inside groups only: a fully sorted epoch would not be random."""


def microbatches(
    lengths: Numbers,
    size: int,
    *,
    seed: int,
    epoch: int,
    target_lengths: Numbers | None = None,
    longest_at: Sequence[int] = (),
) -> list[list[int]]:
    """The microbatches of an epoch: every example once, examples of similar length together, in random order.

    The order is a function of the arguments alone, on every platform, so a resumed run goes on where it was:
    ``RandomState`` is the one NumPy generator whose stream is promised never to change (NEP 19).

    Args:
        lengths: tokens per example, ``(examples,)``.
        size: examples per microbatch; one microbatch may have fewer.
        target_lengths: tokens per example that a decoder reads besides; a batch pads them apart from the others.
        longest_at: where to put the microbatch that pads to the most tokens, the one after it, and so on: early, so
            that an out-of-memory error comes at once. Places beyond the end are left out.
    """
    random = np.random.RandomState([seed % 2**32, epoch])  # a later stage counts on from the recipe's seed
    order = random.permutation(len(lengths))
    batches: list[Numbers] = []
    decoder = np.zeros_like(lengths) if target_lengths is None else target_lengths
    together = lengths + decoder
    for begin in range(0, len(order), GROUP * size):
        group = order[begin : begin + GROUP * size]
        group = group[np.argsort(-together[group], kind="stable")]
        batches.extend(group[i : i + size] for i in range(0, len(group), size))
    shuffled = [batches[i] for i in random.permutation(len(batches))]
    padded = [len(batch) * int(lengths[batch].max() + decoder[batch].max()) for batch in shuffled]
    placed: set[int] = set()
    for place in (place for place in longest_at if place < len(shuffled)):
        longest = max((i for i in range(len(shuffled)) if i not in placed), key=padded.__getitem__)
        for row in (shuffled, padded):
            row[place], row[longest] = row[longest], row[place]
        placed.add(place)
    return [batch.tolist() for batch in shuffled]


def sample(count: int, limit: int, *, seed: int) -> list[int]:
    """Ascending indices of all of ``count`` examples, or of a random ``limit`` of them: files are often sorted."""
    if count <= limit:
        return list(range(count))
    chosen: list[int] = np.sort(np.random.RandomState(seed).permutation(count)[:limit]).tolist()
    return chosen


def classification_batch(inputs: Sequence[Numbers], labels: Numbers, *, pad_id: int) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``(batch, tokens)``, ``labels`` ``(batch,)``."""
    import torch

    return {**_padded(inputs, pad_id), "labels": torch.from_numpy(labels)}


def causal_batch(
    inputs: Sequence[Numbers], answers: Sequence[NDArray[np.bool_]], *, pad_id: int
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``(batch, tokens)``; ``target_positions`` and ``target_ids`` ``(targets,)``.

    Positions count through the flattened batch and are those *before* each learned token.
    """
    import torch

    batch = _padded(inputs, pad_id)
    tokens = batch["input_ids"].shape[1]
    positions = np.concatenate([row * tokens + np.flatnonzero(answer) - 1 for row, answer in enumerate(answers)])
    target_positions = torch.from_numpy(positions)
    return {
        **batch,
        "target_positions": target_positions,
        "target_ids": batch["input_ids"].flatten()[target_positions + 1],
    }


def seq2seq_batch(
    inputs: Sequence[Numbers], targets: Sequence[Numbers], *, pad_id: int, start_id: int
) -> dict[str, torch.Tensor]:
    """As :func:`causal_batch`, with ``decoder_input_ids`` ``(batch, target tokens)`` and positions in those.

    The decoder reads ``start_id`` and the target without its last token, and predicts the target.
    """
    import torch

    decoder = _padded([np.concatenate([[start_id], target[:-1]]) for target in targets], pad_id)
    return {
        **_padded(inputs, pad_id),
        "decoder_input_ids": decoder["input_ids"],
        "target_positions": decoder["attention_mask"].flatten().nonzero().flatten(),
        "target_ids": torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    }


def _padded(rows: Sequence[Numbers], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right, ``(batch, tokens)``, and the mask of what is not padding."""
    import torch

    shape = (len(rows), max(len(row) for row in rows))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
