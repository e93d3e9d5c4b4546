"""A run of peft's example scripts on raft/twitter_complaints, whose memory its README tells, rebuilt: an A100, fp32.

The scripts (``examples/pet_lora_seq2seq_accelerate_ds_zero3_offload.py`` at 5de175184 and its causal sister) load in
fp32, take batches of 8, LoRA of rank 8 with a dropout of 0.1 on the default modules, and PyTorch 1.13, whose AdamW did
not work on lists yet and whose ``zero_grad`` kept gradients. "GB" is their count of MiB, divided by 1000.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import hf
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

A100 = Device(capability=(8, 0), version=(1, 13))
BATCH = 8
TARGET = 4  # tokens of the longest label, "no complaint", with its end
MODELS = {  # the parts of their config.json that are not transformers' defaults
    "bigscience/T0_3B": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 2048,
        "d_ff": 5120,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
    "bigscience/mt0-xxl": {
        "model_type": "mt5",
        "vocab_size": 250112,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
    },
    "bigscience/bloomz-7b1": {
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``step 1`` and ``step 2``.

    Args:
        setup: ``model`` (a key of ``MODELS``), ``method`` ("full" or "lora"), ``tokens`` of a source.
    """
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

    fields = dict(MODELS[setup["model"]])
    causal = fields["model_type"] == "bloom"
    config = AutoConfig.for_model(**fields)
    config = config if layers is None else hf.shallow(config, layers)
    masked = mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    with fake_device(cuda=A100) as tracker, hf.patched(padded=True), masked:
        with tracker.phase("load"):
            auto: Any = AutoModelForCausalLM if causal else _Untied
            model = hf.load(config, torch.float32, attention="eager", device_map=False, auto=auto)
            model.config.use_cache = False
            if setup["method"] == "lora":
                task = "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM"
                lora = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, task_type=task)
                model = peft.get_peft_model(model, lora)
            model.train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=3e-3, foreach=False)
            source = torch.ones(BATCH, setup["tokens"], dtype=torch.long)
            labels = source if causal else torch.ones(BATCH, TARGET, dtype=torch.long)
            batch = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        tracker.label_model(model, trained)
        for step in (1, 2):
            with tracker.phase(f"step {step}"):
                out = model(**batch) if causal else model(**batch, labels=labels)
                loss = _shifted(out.logits, labels) if causal else out.loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            tracker.label_optimizer(optimizer)
    return tracker


class _Untied:
    """The head of these T5s is their own; transformers 5 ties it whatever their configuration says."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_config(config, **options)
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        return model


def _shifted(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss in ``BloomForCausalLM`` of that time."""
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels[..., 1:].contiguous().view(-1))
