"""A small Llama to plan for."""

from __future__ import annotations

from transformers import LlamaConfig

from edgepeft import backbone, hardware, plan, probe

LLAMA = backbone.as_fields(
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)


def configuration(method: str = "lora", precision: str = "fp32", **changes: object) -> probe.Configuration:
    values: dict[str, object] = {
        "model": LLAMA,
        "task": "causal-lm",
        "method": method,
        "options": {},
        "precision": precision,
        "checkpointing": False,
        "microbatch": 2,
        "tokens": 32,
        "target_tokens": 16,
        "labels": 2,
        "accumulates": False,
        "cuda": False,
        "bf16": True,
    }
    return probe.Configuration(**{**values, **changes})  # type: ignore[arg-type]


def small_plan(**changes: object) -> plan.Plan:
    values: dict[str, object] = {
        "name": "tiny",
        "model": LLAMA,
        "task": "causal-lm",
        "hardware": hardware.load("t4-16gb"),
        "tokens": 32,
        "methods": ["lora"],
        "precisions": ["fp32"],
        "checkpointing": False,
    }
    return plan.plan(**{**values, **changes})  # type: ignore[arg-type]
