"""Encoded examples on disk, memory-mapped: only what a batch needs is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edgepeft.data.batches import Numbers, causal_batch, classification_batch, microbatches, seq2seq_batch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Example:
    """One example as text and tokens.

    ``prompt_ids`` is what inference feeds the model: the whole input, or of a causal example everything before its last
    answer. ``reference`` and ``target_ids`` are what should come out; classification has no ``target_ids``.
    """

    where: str
    fields: dict[str, Any]
    prompt_ids: list[int]
    target_ids: list[int]
    reference: str


class Split:
    """The examples to train on, or those to validate on.

    ``lengths`` holds the input tokens of each example and ``target_lengths`` the terms it adds to the loss, both
    ``(examples,)``; ``truncated`` counts examples that lost tokens, ``dropped`` those left out because nothing was
    left to learn.
    """

    def __init__(self, task: str, path: Path, *, dropped: int, pad_id: int) -> None:
        self.task = task
        self.dropped = dropped
        self._pad_id = pad_id
        self._table = datasets.Dataset.from_file(str(path)).with_format("arrow")
        table: pa.Table = self._table.data.table
        self.lengths: Numbers = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
        self.target_lengths: Numbers = table["targets"].to_numpy().astype(np.int64)
        self.truncated: int = pc.sum(table["cut"]).as_py() or 0
        tokens = [name for name in ("input_ids", "target_ids") if name in table.column_names]
        self.largest_token: int = max(pad_id, *(pc.max(pc.list_flatten(table[name])).as_py() or 0 for name in tokens))

    def __len__(self) -> int:
        return len(self.lengths)

    def microbatches(self, size: int, *, seed: int, epoch: int, longest_at: Sequence[int] = ()) -> list[list[int]]:
        """The microbatches of an epoch as lists of example indices; see :func:`edgepeft.data.batches.microbatches`."""
        targets = self.target_lengths if self.task == "seq2seq" else None  # of others they are among the input's tokens
        return microbatches(self.lengths, size, seed=seed, epoch=epoch, target_lengths=targets, longest_at=longest_at)

    def collate(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The examples ``indices`` as one right-padded batch; see :mod:`edgepeft.data.batches` for its tensors."""
        table: pa.Table = self._table[list(indices)]
        inputs = _ragged(table["input_ids"])
        if self.task == "classification":
            return classification_batch(inputs, table["label_id"].to_numpy().astype(np.int64), pad_id=self._pad_id)
        if self.task == "seq2seq":
            # T5 starts decoding with its padding token.
            return seq2seq_batch(inputs, _ragged(table["target_ids"]), pad_id=self._pad_id, start_id=self._pad_id)
        return causal_batch(inputs, _ragged(table["answer"]), pad_id=self._pad_id)

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The examples ``indices`` with their original text, to generate from and to look at."""
        return [self._example(row) for row in self._table[list(indices)].to_pylist()]

    def _example(self, row: dict[str, Any]) -> Example:
        learned = ("input_ids", "label_id", "answer", "target_ids", "targets", "cut", "where")
        fields = {name: value for name, value in row.items() if name not in learned}
        ids, targets = row["input_ids"], row.get("target_ids", [])
        if self.task == "causal-lm":
            first = len(ids) - row["answer"][::-1].index(False)
            ids, targets = ids[:first], ids[first:]
        if "messages" in fields:
            reference = next(m["content"] for m in reversed(fields["messages"]) if m["role"] == "assistant")
        else:
            reference = next(fields[name] for name in ("label", "completion", "target", "text") if name in fields)
        return Example(row["where"], fields, ids, targets, reference)


def _ragged(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """A column of lists as one array per row."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(lists).to_numpy()
    return np.split(values, np.cumsum(lengths)[:-1])
