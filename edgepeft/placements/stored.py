"""Prompts that other runs trained, read from their adapter folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from edgepeft import backbone
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
        found = [tensor for name, tensor in load_file(Path(folder) / TENSORS).items() if name.endswith(PROMPT)]
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{method}: there is no adapter in {folder!r}.", str(error).splitlines()[0], _REMEDY
        ) from error
    if len(found) != 1:
        raise UsageError(
            f"{method}: the adapter in {folder!r} holds no prompt.", f"It is one of {card.get('method')}.", _REMEDY
        )
    trained_on, own = str(card.get("model")), str(getattr(model.config, "_name_or_path", ""))
    if own and own not in (trained_on, _location(trained_on)):
        raise UsageError(
            f"{method}: the prompt in {folder!r} is not one of this backbone.",
            f"It was trained on {trained_on}, and this is {own}.",
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


def _location(name: str) -> str:
    """Where the model of an adapter's card is, if it still is."""
    try:
        return backbone.resolve(name).location
    except UsageError:
        return name


_REMEDY = "Give the folder `adapter` that a run with --method prompt_tuning left."
