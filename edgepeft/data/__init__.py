"""Data sets: files or the hub to checked, split, tokenised examples on disk, and those to batches."""

from __future__ import annotations

from edgepeft.data.build import Data, load, task_of
from edgepeft.data.split import Example, Split

__all__ = ["Data", "Example", "Split", "load", "task_of"]
