"""A run of fitcheck-llm's ``scripts/measure.py`` (0.3.1 on PyPI, MIT) rebuilt: one LoRA or QLoRA step on a Tesla T4."""

from __future__ import annotations

from typing import Any

import torch

import hf
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

T4 = Device(capability=(7, 5), version=(2, 13))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
STEPS = 2  # a warm-up step and the measured one


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``step 1`` and ``step 2``.

    Args:
        setup: ``model`` (hub id), ``quant`` ("nf4" or "none"), ``attention`` ("eager" or "sdpa"), ``rank``,
            ``microbatch``, ``tokens``, ``peft`` (the version it ran with: fitcheck's ``manifest.json``).
    """
    import peft

    config = hf.config(setup["model"], layers)
    with fake_device(cuda=T4) as tracker, hf.patched(padded=False), _gqa_shim():
        with tracker.phase("load"):
            nf4 = setup["quant"] == "nf4"
            model = hf.load(
                config,
                torch.float16,
                attention=setup["attention"],
                nf4="single" if nf4 else None,
                device_map=nf4,
            )
            model.config.use_cache = False
            if nf4:
                model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
                if setup["peft"] != "0.19":  # later versions empty the cache there
                    tracker.empty_cache()
            rank = setup["rank"]
            lora = peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=TARGETS
            )
            model = peft.get_peft_model(model, lora)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.data = parameter.data.float()
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            batch = torch.ones(setup["microbatch"], setup["tokens"], dtype=torch.long)
        tracker.label_model(model, trained)
        for step in range(1, STEPS + 1):
            with tracker.phase(f"step {step}"):
                optimizer.zero_grad(set_to_none=True)
                out = model(input_ids=batch, labels=batch)
                out.loss.backward()
                optimizer.step()
                del out
            tracker.label_optimizer(optimizer)
    return tracker


def _gqa_shim() -> Any:
    """The script repeats keys and values itself, because the kernel that it asks for takes no grouped heads."""
    from unittest import mock

    from torch.nn import functional as F

    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if key.size(-3) != query.size(-3):
            groups = query.size(-3) // key.size(-3)
            key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
            kwargs.pop("enable_gqa", None)
        return original(query, key, value, *args, **kwargs)

    return mock.patch.object(F, "scaled_dot_product_attention", attention)
