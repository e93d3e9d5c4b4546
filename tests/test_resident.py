"""Resident memory as the system counts it: how far it rose inside, and what it ever was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgepeft import resident

MiB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")


def _touched(size: int) -> np.ndarray:
    return np.ones(size, dtype=np.uint8)


@linux
def test_a_rise_is_of_what_was_held_inside() -> None:
    with resident.rise() as found:
        passing = _touched(96 * MiB)
        assert not found
        del passing
    assert found == [pytest.approx(96 * MiB, abs=8 * MiB)]


@linux
def test_a_rise_in_another_is_part_of_it_and_forgets_no_peak() -> None:
    """The outer one began lower and saw more; and what the process ever had is not less for it."""
    before = resident.peak_bytes()
    with resident.rise() as outer:
        kept = _touched(64 * MiB)
        passing = _touched(128 * MiB)
        del passing
        with resident.rise() as inner:
            again = _touched(32 * MiB)
    assert inner == [pytest.approx(32 * MiB, abs=8 * MiB)]
    assert outer == [pytest.approx(192 * MiB, abs=8 * MiB)]
    assert kept[0] == again[0] == 1
    assert resident.peak_bytes() >= before


@linux
@pytest.mark.parametrize("read", [False, True])
def test_mapped_weights_count_as_if_they_were_read(tmp_path: Path, read: bool) -> None:
    """Loading maps a file that has the right dtype, and only training reads it."""
    save_file({"weight": torch.ones(24 * MiB)}, path := tmp_path / "model.safetensors")
    with resident.rise() as found, safe_open(path, framework="pt") as file:
        weight = file.get_tensor("weight")
        if read:
            weight.sum()
    assert found == [pytest.approx(96 * MiB, abs=12 * MiB)]
    assert weight[-1] == 1


def test_where_the_system_cannot_forget_nothing_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "absent" / "clear_refs")
    with resident.rise() as found:
        pass
    assert not found
    assert resident.peak_bytes() > MiB
