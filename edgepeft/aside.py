"""Where a trained model is merged and exported: on its device, or on the processor where that has too little memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgepeft import machine
from edgepeft.errors import EdgePeftError
from edgepeft.hardware import Hardware

GiB = 2**30


def leaves(hardware: Hardware, merge_bytes: int) -> bool:
    """Whether merging, which ends in fp32, takes more memory than a GPU has."""
    return hardware.kind == "cuda" and merge_bytes > hardware.available_bytes


def device_after(stage: str, hardware: Hardware, planned: Mapping[str, Any], say: Callable[[str], None]) -> str:
    """The kind of device that a run's model is loaded on after training.

    Args:
        stage: ``merge`` or ``export``.
        planned: what plan.json holds; nothing of an adapter that was trained elsewhere.

    Raises:
        EdgePeftError: the processor has too little memory as well.
    """
    need = planned.get("predicted_phases", {}).get("merge", 0)
    if not leaves(hardware, need):
        return hardware.kind
    free = machine.memory().available_bytes
    sizes = f"In fp32 it takes {need / GiB:.1f} GiB; the device has {hardware.available_bytes / GiB:.1f} free"
    if need > free:
        raise EdgePeftError(
            f"Memory is short for the {stage} on this machine.",
            f"{sizes}, and the computer {free / GiB:.1f}.",
            f"The adapter is whole: copy the run's folder to a computer with more and run `edgepeft {stage}` on it.",
        )
    say(f"{stage}: on the processor. {sizes}.")
    return "cpu"
