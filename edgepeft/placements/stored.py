"""Prompts that other runs trained, read from their adapter folders."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from edgepeft import backbone, fingerprints
from edgepeft.errors import UsageError

TENSORS, CARD = "adapter.safetensors", "adapter.json"  # of an adapter folder
PROMPT = "prompt.embeddings"  # how the name of a prompt ends


def prompt(method: str, folder: str, model: Any, length: int) -> Tensor:
    """The prompt (length, hidden) of an adapter that was trained on the same backbone, on its device, fp32.

    Raises:
        UsageError: there is none, or it is of another length or backbone.
    """
    try:
        card = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError(f"{CARD} is no JSON object.")
        found = [tensor for name, tensor in load_file(Path(folder) / TENSORS).items() if name.endswith(PROMPT)]
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{method}: there is no adapter in {folder!r}.", str(error).splitlines()[0], _REMEDY
        ) from error
    if len(found) != 1:
        raise UsageError(
            f"{method}: the adapter in {folder!r} holds no prompt.", f"It is one of {card.get('method')}.", _REMEDY
        )
    own = str(getattr(model.config, "_name_or_path", ""))
    if own and (other := other_backbone(card, own)):
        raise UsageError(
            f"{method}: the prompt in {folder!r} is not one of this backbone.",
            other,
            "A prompt means nothing to another model. Train one on this, with --method prompt_tuning.",
        )
    hidden = model.get_input_embeddings().weight.shape[1]
    if found[0].shape != (length, hidden):
        raise UsageError(
            f"{method}: the prompt in {folder!r} has {found[0].shape[0]} tokens of width {found[0].shape[1]}.",
            f"{length} of width {hidden} are needed.",
            f"Use --set options.length={found[0].shape[0]}."
            if found[0].shape[1] == hidden
            else "Use a prompt that was trained on this backbone.",
        )
    # By way of numpy: the planner's fake tensors stand for tensors that are made, not for those read from a file.
    return torch.tensor(found[0], dtype=torch.float32, device=model.get_input_embeddings().weight.device)


def other_backbone(card: Mapping[str, Any], model: str) -> str:
    """Why ``model`` is not what an adapter was trained on, if it is not: by its weights, or by name where it is on the
    hub or the card is of before there were fingerprints.

    Args:
        card: of the adapter.
        model: a name or folder.
    """
    trained_on, known, found = str(card.get("model")), card.get("weights"), weights(model)
    if known and found:
        same = known == found
        changed = "whose weights have changed since" if _location(trained_on) == _location(model) else ""
    else:
        same, changed = _location(trained_on) == _location(model), ""
    return "" if same else f"It was trained on {trained_on}, {changed or f'and this is {model}'}."


def weights(model: str) -> str:
    """A fingerprint of the weights of a model in a folder; empty for one elsewhere."""
    return fingerprints.weights(Path(_location(model)))


def _location(name: str) -> str:
    """Where a model is, if it still is."""
    with contextlib.suppress(UsageError):
        name = backbone.resolve(name).location
    return str(Path(name).resolve()) if Path(name).exists() else name


_REMEDY = "Give the folder `adapter` that a run with --method prompt_tuning left."
