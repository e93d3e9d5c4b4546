"""Everything a training run needs to go on exactly where it stopped: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgepeft import adapter, shards
from edgepeft.errors import EdgePeftError
from edgepeft.files import atomic_directory, sha256, write_json
from edgepeft.methods.base import state
from edgepeft.ranks import ALONE, Ranks

STATE, TENSORS = "state.json", "state.safetensors"
KEEP = 2  # the newest, and one before it in case the newest is damaged


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], ranks: Ranks = ALONE
) -> Path:
    """Write ``folder/step-N``, whole or not at all, and delete all but the newest checkpoints.

    The first of several ranks does, and each goes on from that with its own part of a sharded model.

    Args:
        progress: what else must be remembered, as JSON; its ``step`` names the checkpoint.
    """
    parameters = adapter.trained(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = {f"parameter/{name}": tensor for name, tensor in state(model, transient=True).items()}
    scalars: dict[str, Any] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            where = f"optimizer/{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                held[where] = value
            else:
                scalars[where] = value
    target = folder / f"step-{progress['step']:08d}"
    tensors = shards.collected(held, ranks)
    if not ranks.first:
        return target
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    with atomic_directory(target) as temporary:
        save_file(tensors, temporary / TENSORS)
        plain = {
            "progress": progress,
            "optimizer": scalars,
            "random": _plain_random_states(),
            "sha256": sha256(temporary / TENSORS),
        }
        write_json(temporary / STATE, plain)
    for old in _all(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, if there is one."""
    return next(reversed(_all(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("step-"))


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put parameters, optimizer and random states back as they were, and return the progress.

    Raises:
        EdgePeftError: the checkpoint is damaged, or of another model.
    """
    try:
        plain = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        whole = plain["sha256"] == sha256(checkpoint / TENSORS)
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise EdgePeftError(
            f"The checkpoint {checkpoint} is damaged.",
            "Its files are missing, cut short or changed.",
            f"Delete that folder and run the same command again; it goes on from "
            f"{next((c.name for c in reversed(_all(checkpoint.parent)) if c != checkpoint), 'the beginning')}.",
        )
    tensors = adapter.read_tensors(checkpoint / TENSORS)
    parameters = adapter.trained(model)
    own = {name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")}
    adapter.copy_into(state(model, transient=True), own, str(checkpoint))
    for where, value in [*tensors.items(), *plain["optimizer"].items()]:
        if where.startswith("optimizer/"):
            name, _, key = where.removeprefix("optimizer/").rpartition("/")
            parameter = parameters[name]
            # AdamW keeps its step counts on the CPU unless it is fused; states of a parameter's shape live beside it.
            if isinstance(value, Tensor):
                # not a view of the file, which is deleted in its turn
                divided = value.shape == parameter.shape
                value = shards.part_of(value.clone(), parameter) if divided else value.clone().to(parameter.device)
            optimizer.state[parameter][key] = value
    _restore_random_states(tensors, plain["random"])
    progress: dict[str, Any] = plain["progress"]
    return progress


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _plain_random_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_random_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random/torch"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
