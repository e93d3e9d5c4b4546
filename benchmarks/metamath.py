"""A run of peft's ``method_comparison/MetaMathQA`` rebuilt: Llama-3.2-3B on an L40S, ``run.py`` with its defaults.

The experiments (``metamath.json``) are peft's own files. Its ``accelerator_memory_max`` is the most that was reserved
over the whole run.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import answers
import hf
from edgepeft.cuda_semantics import Device
from edgepeft.trace import Tracker, fake_device

L40S = Device(capability=(8, 9), version=(2, 13))
MODEL = "meta-llama/Llama-3.2-3B"
MICROBATCH, CLIP_NORM = 4, 1.0
SHORT = 100  # tokens of the batch before the longest: the shortest of the bucket before; what it leaves is small
EXPERIMENTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))["experiments"]


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``short`` and ``long``; the cache is emptied before ``long``, as it is between buckets.

    Batches are sorted from long to short inside a bucket of 20, and the cache is emptied every 10 steps: the longest
    batch meets an empty cache, and the optimizer's states. The outputs of the step
    before live until its own replace them.

    Args:
        setup: ``experiment`` (a key of ``EXPERIMENTS``), ``tokens`` of the longest batch.
    """
    experiment = EXPERIMENTS[setup["experiment"]]
    training = experiment.get("training", {})
    with fake_device(cuda=L40S) as tracker, hf.patched(padded=True), answers.given():
        with tracker.phase("load"):
            model = hf.load(hf.config(MODEL, layers), torch.bfloat16)
            if "peft" in experiment:
                model = _adapted(model, experiment["peft"], layers)
            optimizer = _optimizer(model, training)
            if "peft" in experiment:  # run.py measures the base model first; adapters switched on again are all trained
                with model.disable_adapter():
                    pass
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tracker.label_model(model, trained)
        outputs = loss = batch = None
        for name, tokens in (("short", SHORT), ("long", setup["tokens"])):
            with tracker.phase(name):
                model.train()
                batch = _batch(tokens)
                optimizer.zero_grad()
                outputs = model(**batch, num_items_in_batch=MICROBATCH * tokens)
                loss = outputs.loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                if hasattr(getattr(model, "base_model", None), "rankallocator"):
                    model.base_model.rankallocator.update_ipt(model.base_model.model)
                if name == "short":
                    tracker.empty_cache()
            tracker.label_optimizer(optimizer)
        del outputs, loss, batch
    return tracker


def _adapted(model: Any, fields: dict[str, Any], layers: int | None) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = dict(fields)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
    for name in ("num_layers", "adapter_layers"):
        if layers is not None and name in fields:
            fields[name] = layers
    known = inspect.signature(kind).parameters  # as PeftConfig.from_pretrained does, leave out what this version lacks
    return peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **{k: v for k, v in fields.items() if k in known}))


def _optimizer(model: Any, training: dict[str, Any]) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    options = training.get("optimizer_kwargs", {"lr": 1e-4, "weight_decay": 0.1})
    kind = training.get("optimizer_type", "AdamW")
    if kind == "lora-fa":
        return create_lorafa_optimizer(model, **options)
    if kind == "lora+":
        return create_loraplus_optimizer(model, optimizer_cls=torch.optim.AdamW, **options)
    if kind == "riemannian":
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, optimizer_cls=torch.optim.AdamW, **options)
    return getattr(torch.optim, kind)(model.parameters(), **options)


def _batch(tokens: int) -> dict[str, Tensor]:
    shape = (MICROBATCH, tokens)
    ids = torch.ones(shape, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.long), "labels": ids.clone()}
