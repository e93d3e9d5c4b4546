"""LoRA and QLoRA steps of Llama models by transformers 4.3x rebuilt: fsdp_qlora, LLaMA-Factory, Unsloth's peers.

The layers are those of the installed transformers. What differs and weighs most is written out as it was: the model
itself turned all logits to fp32 and gave them back, and the loss took a shifted copy (modeling_llama.py before 4.45);
bitsandbytes (up to 0.43) kept the inputs of packed layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import bnb043
import hf
from edgepeft.cuda_device import Device
from edgepeft.placements import eight_bit
from edgepeft.trace import Tracker, fake_device

LLAMA2 = {  # config.json of meta-llama/Llama-2-7b-hf; not in the catalogue
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Style:
    """How a project trains.

    Attributes:
        amp: adapters in fp32 and the step under autocast; without, everything is in bfloat16.
        upcast: peft's ``prepare_model_for_kbit_training``, which makes embeddings, norms and the head fp32.
        eight_bit: bitsandbytes' AdamW with states in 8 bits.
    """

    rank: int
    device: Device
    dropout: float = 0.0
    amp: bool = True
    upcast: bool = False
    eight_bit: bool = False


STYLES = {
    # train.py's defaults at rank 64; its "ddp" is FSDP without sharding, which holds what one GPU would
    "fsdp_qlora": Style(rank=64, dropout=0.1, amp=False, device=Device(capability=(8, 6), version=(2, 2))),
    # src/llmtuner of April 2024, its defaults beside --lora_target all and --quantization_bit 4
    "llama_factory": Style(rank=8, device=Device(capability=(8, 0), version=(2, 2))),
    # Unsloth's benchmark pages name rank and modules; 8-bit AdamW in unslothai/unsloth#22 ("all benchmarks I did")
    "unsloth": Style(rank=32, upcast=True, eight_bit=True, device=Device(capability=(8, 0), version=(2, 3))),
}


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load``, ``step 1`` and ``step 2``, with checkpointing by reentrant autograd.

    Args:
        setup: ``style`` (a key of ``STYLES``), ``model`` (in the catalogue, or Llama 2 7B), ``quant`` ("none", "nf4" or
            "nf4-dq"), ``microbatch``, ``tokens``.
    """
    import peft

    style = STYLES[setup["style"]]
    quants: dict[str, Literal["single", "double"]] = {"nf4": "single", "nf4-dq": "double"}
    old_product = mock.patch.object(hf.FakeLinear4bit, "forward", bnb043.forward)
    with fake_device(cuda=style.device) as tracker, hf.patched(padded=False), old_product:
        with tracker.phase("load"):
            model = hf.load(
                _config(setup["model"], layers), torch.bfloat16, attention="sdpa", nf4=quants.get(setup["quant"])
            )
            model.config.use_cache = False
            reentrant = {"use_reentrant": True}
            if style.upcast:
                model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=reentrant)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
            model.enable_input_require_grads()
            lora = peft.LoraConfig(
                r=style.rank, lora_alpha=16, lora_dropout=style.dropout, task_type="CAUSAL_LM", target_modules=LINEAR
            )
            model = peft.get_peft_model(model, lora, autocast_adapter_dtype=style.amp)
            model.train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.data = parameter.data.to(torch.float32 if style.amp else torch.bfloat16)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained)
            if style.eight_bit:  # what is bitsandbytes' AdamW8bit on fp32 parameters
                optimizer = eight_bit.AdamW([{"params": trained}], lr=1e-4)
            batch = torch.ones(setup["microbatch"], setup["tokens"], dtype=torch.long)
            labels = batch.clone()
        tracker.label_model(model, trained)
        for step in (1, 2):
            with tracker.phase(f"step {step}"):
                with _amp() if style.amp else contextlib.nullcontext():
                    with torch.autocast("cpu", torch.bfloat16, enabled=style.amp):
                        loss, logits = _forward(model.base_model.model, batch, labels)
                    loss.backward()  # and runs layers again, in the same autocast
                del logits
                optimizer.step()
                optimizer.zero_grad()
                del loss
            tracker.label_optimizer(optimizer)
    return tracker


def _config(model: str, layers: int | None) -> Any:
    from transformers import AutoConfig

    if model != "meta-llama/Llama-2-7b-hf":
        return hf.config(model, layers)
    config = AutoConfig.for_model("llama", **LLAMA2)
    return config if layers is None else hf.shallow(config, layers)


def _forward(model: Any, batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``LlamaForCausalLM.forward`` before transformers 4.45: the loss, and the logits that the caller kept with it."""
    logits = model.lm_head(model.model(input_ids=batch, use_cache=False)[0]).float()
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1)), logits


@contextlib.contextmanager
def _amp() -> Iterator[None]:
    """What a GPU's autocast has beside the CPU's: peft asks whether it is on, and flash attention takes halves only."""
    attention = F.scaled_dot_product_attention

    def halves(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        half = torch.bfloat16
        return attention(query.to(half), key.to(half), value.to(half), *args, **options)

    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: True),
        mock.patch.object(F, "scaled_dot_product_attention", halves),
    ):
        yield
