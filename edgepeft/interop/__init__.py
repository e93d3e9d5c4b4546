"""Adapters in HF PEFT's folder format (adapter_config.json, adapter_model.safetensors), out and in, without PEFT.

PEFT names modules, edgepeft the roles of ``anatomy``; the model's structure, built without weights, translates between
them, and every adapter is held against it before it is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from edgepeft import adapter, recipe
from edgepeft.errors import UsageError
from edgepeft.files import atomic_directory
from edgepeft.interop.reading import read
from edgepeft.interop.writing import write
from edgepeft.peft_config import FILE, PREFIX, WEIGHTS


def convert(source: Path, target: Path, model: str | None = None) -> tuple[str, ...]:
    """Write the adapter in ``source``, PEFT's or edgepeft's or that of a run, as one of the other's.

    Args:
        model: the backbone of an adapter of PEFT's, where it is not where the adapter says.

    Returns:
        What a user of the new folder should know.

    Raises:
        UsageError: it is neither, or of a run that is not trained to its end, or cannot be expressed.
        EdgePeftError: it is damaged.
    """
    folder = source / "adapter" if (source / "adapter").is_dir() else source
    if (folder / adapter.CARD).exists() and adapter.read_card(folder).method.startswith(PREFIX):
        raise UsageError(
            f"The adapter in {folder} is one of PEFT's as it is.",
            "PEFT's own layers were trained, and edgepeft saves them in both formats.",
            f"Load it with PeftModel.from_pretrained(model, {str(folder)!r}).",
        )
    if (source / FILE).exists():
        return read(source, target, model)
    if not (folder / adapter.CARD).exists():
        recipe.check_trained(source)
        raise UsageError(
            f"There is no adapter in {source}.",
            f"It holds neither {adapter.CARD} (edgepeft's) nor {FILE} (PEFT's).",
            "Give the folder of a run that was trained, of its adapter, or one that PEFT's save_pretrained wrote.",
        )
    keep_backbone(folder, model)
    if (folder / FILE).exists():  # what PEFT itself changed (``foreign``) has its files beside the card
        with atomic_directory(target) as made:
            for name in (FILE, WEIGHTS):
                shutil.copyfile(folder / name, made / name)
        return ()
    return write(folder, target)


def keep_backbone(folder: Path, model: str | None) -> None:
    """Refuse another backbone for an adapter of edgepeft's.

    Raises:
        UsageError: ``model`` names one.
    """
    if model is not None:
        own = adapter.read_card(folder).model
        raise UsageError(
            "--model goes with an adapter of PEFT's.",
            f"The card in {folder} names the backbone it was trained on, {own}.",
            "Leave --model out.",
        )
