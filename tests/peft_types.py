"""Every type of HF PEFT on a tiny model: planned, trained, saved, put back, read by PEFT and merged, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import conformance
import peft
import tiny
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from edgepeft import adapter, backbone, step, traces
from edgepeft.errors import EdgePeftError
from edgepeft.merge import relative_difference, to_full_precision
from edgepeft.methods import base
from edgepeft.methods.base import NotMergeable
from edgepeft.surface import Configuration, Surface

TYPES = tuple(sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
ROUNDING = 1e-5

# What a type needs beside its name on layers as narrow as a tiny model's; all else is PEFT's default.
_FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {"n_frequency": 16},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4},
    "MISS": {"r": 8},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "OFT": {"oft_block_size": 8},
    "PEANUT": {"r": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 16},
}
_TARGETS: dict[str, dict[str, list[str]]] = {
    "LN_TUNING": {"llama": ["input_layernorm"], "bert": ["LayerNorm"], "t5": ["layer_norm"]},
    "TRAINABLE_TOKENS": {"llama": ["embed_tokens"], "bert": ["word_embeddings"], "t5": ["shared"]},
}
_LINEARS = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}


def fields(kind: str, family: str) -> dict[str, Any]:
    """The content of an ``adapter_config.json`` of a type for a family's tiny model."""
    found = {"peft_type": kind, **_FIELDS.get(kind, {})}
    accepted = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)].__dataclass_fields__
    if "target_modules" in accepted and kind not in ("ADAPTION_PROMPT", "SHADOW"):
        found["target_modules"] = _TARGETS.get(kind, _LINEARS)[family]
    return found


def write(folder: Path, content: dict[str, Any]) -> str:
    """The name of the method that a configuration is, once it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return f"peft:{folder}"


def planned(name: str, family: str, at: str = "fp32", **changes: Any) -> Surface | EdgePeftError:
    """What the planner finds for a method on a family's tiny model."""
    wanted: dict[str, Any] = {
        "model": backbone.as_fields(tiny.configuration(family)),
        "task": tiny.task(family),
        "method": name,
        "options": {},
        "precision": at,
        "checkpointing": False,
        "microbatch": 1,
        "tokens": 16,
        "target_tokens": 8,
        "labels": tiny.LABELS,
        "accumulates": True,
        "cuda": False,
        "bf16": False,
    }
    return traces.find([Configuration(**(wanted | changes))])[0]


def goes_through(kind: str, family: str, at: str, folder: Path) -> str:
    """Take a type through all that a run does with it; what became of its merge.

    Raises:
        EdgePeftError: it is refused.
        AssertionError: something is not as it should be.
    """
    name = write(folder / "configuration", fields(kind, family))
    method, batch = base.create(name), tiny.batch(family)
    found = planned(name, family, at)
    if isinstance(found, EdgePeftError):
        raise found
    torch.manual_seed(0)
    made = tiny.load(family, at)
    base.complete(method, made)
    model = made.model
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    before = {key: tensor.clone() for key, tensor in adapter.trained(model).items()}
    losses = conformance.train(model, method, method.stages()[0], batch, 3)
    assert losses[-1] < losses[0] or kind == "PVERA", losses  # which samples what it computes in training
    changed = [key for key, tensor in adapter.trained(model).items() if not torch.equal(tensor, before[key])]
    assert changed
    logits = _logits(model, batch)
    card = adapter.card(method, model="tiny", task=made.task, precision=at, labels=None, seed=0)
    adapter.save(folder / "adapter", model, card)
    torch.manual_seed(1)  # what starts at random must come from the file
    again = tiny.load(family, at)
    base.complete(base.create(card.method, card.options), again)
    adapter.load(folder / "adapter", again.model)
    again.model.eval()
    assert relative_difference([logits], [_logits(again.model, batch)]) < ROUNDING
    if at == "fp32":
        theirs = peft.PeftModel.from_pretrained(tiny.load(family).model, str(folder / "adapter")).eval()
        of_task = {"task_ids": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}
        others = _logits(theirs, batch, **(of_task if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}))
        others = others[:, -logits.shape[1] :] if logits.dim() == 3 else others  # PEFT's has those of a prompt too
        assert relative_difference([logits], [others]) < ROUNDING
    to_full_precision(model)
    logits = _logits(model, batch)
    try:
        method.merge(model)
    except NotMergeable as error:
        return str(error.cause)
    assert relative_difference([logits], [_logits(model, batch)]) < 1e-4
    plain = tiny.load(family).model
    assert conformance.structure(plain) == conformance.structure(model)
    return ""


def _logits(model: Any, batch: step.Batch, **more: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**step.inputs(batch), **more).logits
    return found.float()
