"""A run of lit-gpt's resource tables (tutorials/resource-tables.md) rebuilt with lit-gpt's own model code, on an A100.

The tables were measured with PyTorch 2.1.0 and bitsandbytes 0.41.1 by the scripts ``finetune/lora.py`` (at commit
8641822, they say) and ``finetune/adapter.py`` and ``adapter_v2.py`` (at 0f021f3, which added quantisation and these
rows). Their "Max GPU RAM" is ``max_memory_allocated() / 1e9``. The first microbatch holds the longest example of the
data, whose tokens the tables state, so no length is assumed. lit-gpt's code is fetched (``sources.py``), not copied.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import bnb043
import hf
import sources
from edgepeft.cuda_device import Device
from edgepeft.trace import Tracker, fake_device

A100 = Device(capability=(8, 0), version=(2, 1))
LORA = {"r": 8, "alpha": 16, "dropout": 0.05, "to_query": True, "to_value": True}  # the defaults of finetune/lora.py
CHUNK = 128  # logits at a time
BATCH = 128  # examples an update


def trace(setup: dict[str, Any], layers: int | None) -> Tracker:
    """Phases ``load`` and ``step``: forward and backward of the first microbatch. It is before the first update.

    Args:
        setup: ``model`` (its name in lit_gpt/config.py), ``method`` ("lora", "adapter" or "adapter_v2"), ``commit``,
            ``quant`` ("none", "nf4" or "nf4-dq"), ``microbatch``, ``tokens``.
    """
    method, quant = setup["method"], setup["quant"]
    sources.use("Lightning-AI/litgpt", str(setup["commit"]))
    code = importlib.import_module(f"lit_gpt.{method}")
    losses: Any = importlib.import_module("lit_gpt.utils")
    losses.max = lambda least, counted: counted  # how many targets count: a fake tensor cannot be compared with 1
    config = code.Config.from_name(setup["model"], **(LORA if method == "lora" else {}))
    config.n_layer = config.n_layer if layers is None else layers
    shape = setup["microbatch"], setup["tokens"]
    with fake_device(cuda=A100) as tracker, hf.patched(padded=False):
        with tracker.phase("load"):
            with _default(torch.bfloat16), _packing(quant):
                model = code.GPT(config)
            getattr(code, f"mark_only_{method}_as_trainable")(model)
            model.max_seq_length = setup["tokens"]
            inputs, targets = torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
        tracker.label_model(model, [parameter for parameter in model.parameters() if parameter.requires_grad])
        model.train()
        with tracker.phase("step"):
            with _default(torch.bfloat16):
                logits = model(inputs, lm_head_chunk_size=CHUNK)
            logits = [chunk.float() for chunk in logits]  # both of lightning's precision plugins give fp32 back
            logits[-1] = logits[-1][..., :-1, :]
            loss = losses.chunked_cross_entropy(logits, targets[..., 1:])
            (loss / (BATCH // setup["microbatch"])).backward()
    return tracker


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _packing(quant: str) -> Any:
    """lightning's BitsandbytesPrecision puts its own class in the place of ``torch.nn.Linear``."""
    if quant == "none":
        return contextlib.nullcontext()
    double = quant == "nf4-dq"
    return mock.patch.object(nn, "Linear", lambda *args, **kwargs: _Linear4bit(*args, double=double, **kwargs))


class _Linear4bit(nn.Module):
    """A linear layer as bitsandbytes 0.41 and lightning hold it: packed from fp16, whatever the model computes in."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, double: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features).half()
        with _default(torch.float32):
            packed, self.state = hf._quantized(weight, torch.float16, double=double)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return bnb043.Product.apply(x, self.weight, self.bias, self.state)
