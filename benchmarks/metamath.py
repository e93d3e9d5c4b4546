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
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

L40S = Device(capability=(8, 9), version=(2, 13))
MODEL = "meta-llama/Llama-3.2-3B"
MICROBATCH, CLIP_NORM = 4, 1.0
# Tokens of batches, from lengths.py; those of training are estimates, those of evaluations are not.
BEFORE = (630, 376, 304, 267, 243, 223, 208, 196, 185, 174)  # the ten before the evaluation that finds most reserved
SHORT = 88  # the last of a bucket
PROMPTS, PROMPT, NEW = 50, 120, 300  # examples, tokens and most new tokens of a batch of the validation set
# What the model's own generation_config.json sets
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 128001}
EXPERIMENTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))["experiments"]


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``short``, one for each length of the longest batch, and, if asked for, an evaluation's two.

    Batches are sorted from long to short inside a bucket of 20, and the cache is emptied every 10 steps: the first of a
    bucket, so also the longest of the run, meets an empty cache, and the optimizer's states. An evaluation comes before
    the cache is emptied, so it finds what the ten batches before it (phase ``before``) have left there. The outputs of
    a step live until those of the next replace them.

    Args:
        setup: ``experiment`` (a key of ``EXPERIMENTS``), ``tokens`` (lengths that the longest batch may have; they name
            the phases), and whether it is ``evaluated``.
    """
    experiment = EXPERIMENTS[setup["experiment"]]
    steps: list[tuple[str, tuple[int, ...]]] = [("short", (SHORT,))]
    for tokens in setup["tokens"]:
        steps += [(str(tokens), (tokens,)), (f"after {tokens}", (SHORT,))]
    if setup["evaluated"]:
        steps.append(("before", BEFORE))
    with fake_device(cuda=L40S) as tracker, hf.patched(padded=True), answers.given():
        with tracker.phase("load"):
            model = hf.load(hf.config(MODEL, layers), torch.bfloat16)
            if "peft" in experiment:
                model = _adapted(model, experiment, layers)
            optimizer = _optimizer(model, experiment.get("training", {}))
            if "peft" in experiment:  # run.py measures the base model first; adapters switched on again are all trained
                with model.disable_adapter():
                    pass
        outputs = loss = batch = None
        for name, lengths in steps:
            with tracker.phase(name):
                model.train()
                for tokens in lengths:
                    batch = _batch(MICROBATCH, tokens, labels=True)
                    optimizer.zero_grad()
                    outputs = model(**batch, num_items_in_batch=MICROBATCH * tokens)
                    loss = outputs.loss
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                    optimizer.step()
                    if hasattr(getattr(model, "base_model", None), "rankallocator"):
                        model.base_model.rankallocator.update_ipt(model.base_model.model)
                if name != "before":
                    tracker.empty_cache()
        if setup["evaluated"]:
            with tracker.phase("evaluation"):
                _generate(model)
        del outputs, loss, batch
    return tracker


def _generate(model: Any) -> None:
    """An evaluation of run.py: it goes on until every answer has ended, and one of so many hardly ever does in time."""
    from transformers import GenerationConfig

    model.eval()
    model.generation_config.update(**SAMPLING)
    wanted = GenerationConfig(max_length=PROMPT + NEW, pad_token_id=SAMPLING["eos_token_id"])
    with torch.no_grad(), answers.generating(NEW):
        model.generate(**_batch(PROMPTS, PROMPT), generation_config=wanted)


def _adapted(model: Any, experiment: dict[str, Any], layers: int | None) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = dict(experiment["peft"])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
    for name in ("num_layers", "adapter_layers"):
        if layers is not None and name in fields:
            fields[name] = layers
    known = inspect.signature(kind).parameters  # as PeftConfig.from_pretrained does, leave out what this version lacks
    config = kind(task_type="CAUSAL_LM", **{key: value for key, value in fields.items() if key in known})
    cast = experiment.get("training", {}).get("autocast_adapter_dtype", True)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    answers.leave_on_host(model)
    return model


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


def _batch(examples: int, tokens: int, *, labels: bool = False) -> dict[str, Tensor]:
    ids = torch.ones((examples, tokens), dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "labels": ids.clone()} if labels else batch
