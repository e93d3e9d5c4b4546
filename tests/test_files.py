"""Files are whole or absent, and a full disk is said to be full."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from edgepeft import files
from edgepeft.errors import EdgePeftError


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    with files.atomic_directory(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old" and list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    for name in ("old", "new"):
        with files.atomic_directory(folder) as temporary:
            (temporary / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("rename", [1, 2, 3])
def test_a_process_killed_while_it_replaces_a_folder_leaves_one(rename: int, tmp_path: Path) -> None:
    """Before the old one is moved away, before the new one takes its place, and before the old one is deleted."""
    script = """
import os, shutil, signal, sys
from pathlib import Path
from edgepeft import files

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def replace(*paths, real=os.replace, done=[]):
    done.append(paths)
    kill() if len(done) == int(sys.argv[2]) else real(*paths)

folder = Path(sys.argv[1])
with files.atomic_directory(folder) as temporary:
    (temporary / "a").write_text("old")
os.replace, shutil.rmtree = replace, lambda path, **_: kill() if path.suffix == ".old" else None
with files.atomic_directory(folder) as temporary:
    (temporary / "a").write_text("new")
"""
    folder = tmp_path / "run" / "adapter"
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(rename)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (folder.parent / ".somebody.elses.old").mkdir()
    files.remove_leftovers(tmp_path)
    assert (folder / "a").read_text() == ("new" if rename == 3 else "old")
    assert {path.name for path in folder.parent.iterdir()} == {"adapter", ".somebody.elses.old"}


def test_a_full_disk_is_named_when_safetensors_meets_it(tmp_path: Path) -> None:
    """Its error has no number; this is its text on a full file system."""
    with pytest.raises(EdgePeftError, match="disk is full"), files.refusing_full_disk(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_trouble_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), files.refusing_full_disk(tmp_path):
        tmp_path.open("w")


def test_sizes_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"1234")
    assert files.size_bytes(tmp_path) == 7 and files.size_bytes(tmp_path / "a") == 3
    # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_may_be_read_by_whoever_may_read_their_neighbours(tmp_path: Path) -> None:
    """safetensors makes files for their owner alone."""
    with files.atomic_directory(tmp_path / "adapter") as folder:
        save_file({"a": torch.zeros(1)}, folder / "adapter.safetensors")
        (folder / "adapter.json").write_text("{}")
    tensors, card = sorted((tmp_path / "adapter").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert tensors.suffix == ".safetensors" and tensors.stat().st_mode == card.stat().st_mode
