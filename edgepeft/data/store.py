"""Examples written to Arrow files, through which memory-mapping reads them however large they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from edgepeft.data.columns import Layout
from edgepeft.data.encode import Encoder
from edgepeft.data.source import Source
from edgepeft.errors import UsageError


def write_rows(source: Source, layout: Layout, folder: Path) -> datasets.Dataset:
    """The checked rows of a source, written to ``folder``."""

    def examples() -> Iterator[dict[str, Any]]:
        for where, row in source.read():
            yield layout.example(where, row)

    try:
        # A fingerprint of our own: datasets would pickle the generator to name it, and the name would differ every
        # time.
        rows = datasets.Dataset.from_generator(
            examples, features=layout.features, cache_dir=str(folder), fingerprint="rows", keep_in_memory=False
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    return rows


def write_encoded(rows: datasets.Dataset, encoder: Encoder, path: Path) -> int:
    """Write the tokens of ``rows`` to ``path``. Returns how many rows had nothing left to learn."""
    encoded = rows.map(
        encoder,
        batched=True,
        batch_size=1000,
        remove_columns=rows.column_names,
        features=encoder.features,
        cache_file_name=str(path),
        new_fingerprint=path.stem,
        load_from_cache_file=False,
        keep_in_memory=False,
    )
    if len(encoded) == 0:
        raise UsageError(
            f"No example of the {path.stem} split has a token left to learn.",
            f"None of its {len(rows)} answers gave a token that fits.",
            "Allow more tokens, or check the data.",
        )
    return len(rows) - len(encoded)


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars of datasets: they would break into those of the command line."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
