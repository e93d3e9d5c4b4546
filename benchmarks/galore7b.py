"""GaLore's "LLaMA 7B on an RTX 4090" rebuilt: pre-training with an update inside backward, by its own optimizer.

From its README and ``torchrun_main.py``: 16 sequences of 256 tokens (the default, padded to it), bf16, checkpointing,
``galore_adamw8bit_per_layer`` at rank 1024. The layers are those of the installed transformers, the loss is that of its
``modeling_llama.py``: logits stay bf16. What cuSOLVER takes for a decomposition is not known and not counted.
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import causal
import hf
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

RTX_4090 = Device(capability=(8, 9), version=(2, 1))
GROUP = {"rank": 1024, "update_proj_gap": 1000, "scale": 0.25, "proj_type": "std"}


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``step 1`` (with all decompositions) and ``step 2``.

    Args:
        setup: ``microbatch``, ``tokens``.
    """
    import bitsandbytes as bnb

    theirs: Any = importlib.import_module("galore_torch")

    with (
        fake_device(cuda=RTX_4090) as tracker,
        hf.patched(padded=False),
        mock.patch.object(bnb.optim.optimizer.Optimizer8bit, "fill_qmap", _codes),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        with tracker.phase("load"):
            config = causal._config(
                "meta-llama/Llama-2-7b-hf", layers
            )  # whose sizes are those of configs/llama_7b.json
            model = hf.load(config, torch.bfloat16, attention="sdpa", device_map=False)
            model.config.use_cache = False
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.train()
            projected = {
                id(module.weight)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
            }
            optimizers: dict[nn.Parameter, Any] = {}
            for parameter in model.parameters():
                if id(parameter) in projected:
                    optimizers[parameter] = theirs.GaLoreAdamW8bit([{"params": [parameter], **GROUP}], weight_decay=0)
                else:
                    optimizers[parameter] = bnb.optim.Adam8bit([parameter], weight_decay=0)
                parameter.register_post_accumulate_grad_hook(lambda p: _update(optimizers[p]))
            batch = torch.ones(setup["microbatch"], setup["tokens"], dtype=torch.long)
            labels = batch.clone()
        for step in (1, 2):
            with tracker.phase(f"step {step}"):
                logits = model.lm_head(model.model(input_ids=batch, use_cache=False)[0])
                shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
                loss = F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))
                del shifted, logits  # its caller takes the loss alone
                loss.backward()
                del loss
    return tracker


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _codes(optimizer: Any) -> None:
    """bitsandbytes' tables of codes, without their values."""
    optimizer.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
