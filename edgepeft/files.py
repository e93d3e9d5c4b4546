"""Files that are either whole or absent: everything is written under a temporary name and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgepeft.errors import EdgePeftError

_MASK = os.umask(0o077)  # it can only be read by setting it
os.umask(_MASK)


@contextmanager
def refusing_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's 'no space left' into an error that says which folder is full."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and f"(os error {errno.ENOSPC})" not in str(error):  # safetensors says it in its message only
            raise
        folder = next(parent for parent in path.parents if parent.exists() and not parent.name.endswith(".part"))
        raise EdgePeftError(
            f"The disk is full: {path} could not be written.",
            "What was finished before is still there.",
            f"Free some space under {folder} and run the same command again; it goes on where it stopped.",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with refusing_full_disk(path):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary empty folder beside ``path``; on success it replaces ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with refusing_full_disk(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes were writing below ``folder``, and put back what they had only moved away yet.

    For folders that no other process writes to.
    """
    for path in _leftovers(folder, "old"):
        replaced = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if not replaced.exists():  # killed between the two renames: this is all there is of it
            os.replace(path, replaced)
    for path in [*_leftovers(folder, "old"), *_leftovers(folder, "part")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _leftovers(folder: Path, kind: str) -> list[Path]:
    """What is named as here; others may end their names alike."""
    return [path for path in folder.rglob(f".*.{kind}") if path.name.rsplit(".", 2)[-2].isdecimal()]


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _flush(path: Path) -> None:
    """Have the bytes on disk before the rename that makes them visible, so that a power cut leaves no empty file.

    safetensors makes files for their owner alone, whatever the user's mask says; they get the mode of all others.
    """
    if path.suffix == ".safetensors" or ".safetensors." in path.name:
        path.chmod(0o666 & ~_MASK)
    with path.open("rb") as file:
        os.fsync(file.fileno())
