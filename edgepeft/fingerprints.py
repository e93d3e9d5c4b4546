"""Short hashes of data, files and models, by which the same is known again wherever it lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from edgepeft.files import sha256

_WEIGHTS = (".safetensors", ".gguf", ".bin")
_PIECES, _PIECE = 64, 1 << 20  # of large ones that are looked at: training changes all of a file


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data, and of files and folders by their names and contents."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_file():
            digest.update(_content(part).encode())
        elif isinstance(part, Path):
            for file in sorted(path for path in part.rglob("*") if path.is_file()):
                digest.update(f"{file.relative_to(part)} {_content(file)}\n".encode())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _content(file: Path) -> str:
    """A hash of a file; of large weights, which may take minutes to read, of pieces all over it and their size."""
    size = file.stat().st_size
    if file.suffix not in _WEIGHTS or size <= _PIECES * _PIECE:
        return sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as source:
        for number in range(_PIECES):
            source.seek(number * (size - _PIECE) // (_PIECES - 1))
            digest.update(source.read(_PIECE))
    return digest.hexdigest()


def weights(folder: Path) -> str:
    """A fingerprint of the weights in a model's folder, whatever lies beside them; empty where there are none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in _WEIGHTS and path.is_file())
    return fingerprint([(path.name, _content(path)) for path in files]) if files else ""
