"""Tiny real models of every family, with random weights and batches, to test methods, training and tracing on."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from edgepeft import adapter, backbone, step
from edgepeft.backbone import Backbone
from edgepeft.data.batches import causal_batch, classification_batch, seq2seq_batch
from edgepeft.methods import base
from edgepeft.methods.base import Method

VOCABULARY, LABELS = 96, 3
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": LABELS,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

# family: task, class, configuration
_FAMILIES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "llama": (
        "causal-lm",
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=False),
    ),
    "qwen2": (
        "causal-lm",
        "Qwen2ForCausalLM",
        lambda: transformers.Qwen2Config(**{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}),
    ),
    "qwen3": (
        "causal-lm",
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3Config(**_LLAMA_LIKE, tie_word_embeddings=True),
    ),
    "gemma2": (
        "causal-lm",
        "Gemma2ForCausalLM",
        # a cap so low that it bends nearly every logit, and a window shorter than the batches
        lambda: transformers.Gemma2Config(
            **_LLAMA_LIKE,
            query_pre_attn_scalar=8,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=3.0,
            sliding_window=4,
            attn_implementation="eager",
        ),
    ),
    "gpt2": (
        "causal-lm",
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
        ),
    ),
    "bert": ("classification", "BertForSequenceClassification", lambda: transformers.BertConfig(**_BERT_LIKE)),
    "distilbert": (
        "classification",
        "DistilBertForSequenceClassification",
        lambda: transformers.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            num_labels=LABELS,
        ),
    ),
    "t5": ("seq2seq", "T5ForConditionalGeneration", lambda: transformers.T5Config(**_T5)),
    "t5-gated": (
        "seq2seq",
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}
FAMILIES = tuple(_FAMILIES)


def task(family: str) -> str:
    """The task of a family's tiny model."""
    return _FAMILIES[family][0]


def configuration(family: str) -> Any:
    """A new configuration."""
    return _FAMILIES[family][2]()


def model(family: str, **changes: Any) -> PreTrainedModel:
    """A new model in evaluation mode, without dropout unless ``changes`` of its configuration say so."""
    config = configuration(family)
    for name in ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "dropout_rate"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "seq_classif_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    made: PreTrainedModel = getattr(transformers, _FAMILIES[family][1])(config)
    if family == "t5-gated":  # FLAN-T5's head is its own, which configurations can no longer say
        made.lm_head.weight = nn.Parameter(torch.empty_like(made.lm_head.weight))
    randomise(made)
    return made.eval()


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter values of ordinary size.

    Libraries start biases, scales and deltas at zero or one, which hides whether they are used at all.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(parameter.mean().round() + 0.2 * noise)


@cache
def folder(family: str) -> Path:
    """The family's tiny model as ``save_pretrained`` writes it. Read only: tests share it."""
    made = Path(tempfile.mkdtemp(prefix=f"edgepeft-{family}-"))
    remove_at_exit(made)
    model(family).save_pretrained(made)
    return made


def remove_at_exit(path: Path) -> None:
    """Delete a folder when the tests end."""
    atexit.register(shutil.rmtree, path, ignore_errors=True)


def load(family: str, at: str = "fp32", *, seed: int = 0) -> Backbone:
    """A family's tiny model as a backbone of its own."""
    labels = [f"label-{number}" for number in range(LABELS)] if task(family) == "classification" else None
    return backbone.load(backbone.resolve(str(folder(family))), task=task(family), at=at, labels=labels, seed=seed)


def method(name: str, **options: Any) -> Method:
    """A method, with the hyper-parameters it has for narrow models."""
    return base.create(name, {**base.find(name).narrow, **options})


def adapted(family: str, name: str, at: str = "fp32", **options: Any) -> tuple[Backbone, Method]:
    """A backbone with a method in it, all of whose stages have begun."""
    made, chosen = load(family, at), method(name, **{**others(family, name), **options})
    base.complete(chosen, made)
    return made, chosen


def others(family: str, name: str) -> dict[str, Any]:
    """What a method needs of other runs on a family's tiny model, as options."""
    if name == "spot":
        return {"source": prompts(family)[0]}
    return {"prompts": prompts(family)} if name == "ipt" else {}


@cache
def prompts(family: str) -> tuple[str, ...]:
    """Adapter folders of three tasks' prompts for a family's tiny model. Read only: tests share them."""
    made = Path(tempfile.mkdtemp(prefix=f"edgepeft-{family}-prompts-"))
    remove_at_exit(made)
    for seed in range(3):
        tuned, chosen = adapted(family, "prompt_tuning")
        randomise(nn.ParameterList(adapter.trained(tuned.model).values()), seed)
        card = adapter.card(
            chosen, model=str(folder(family)), task=task(family), precision="fp32", labels=None, seed=seed
        )
        adapter.save(made / str(seed), tuned.model, card)
    return tuple(str(made / str(seed)) for seed in range(3))


def batch(kind: str, rows: int = 4, *, seed: int = 0, lengths: tuple[int, int] = (5, 12)) -> dict[str, torch.Tensor]:
    """A padded batch for a task, or a family's task, made by the collators of ``edgepeft.data``.

    There is no padding if both lengths are the same.
    """
    kind = task(kind) if kind in _FAMILIES else kind
    random = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return random.integers(2, VOCABULARY, count)

    sizes = [int(random.integers(lengths[0], lengths[1] + 1)) for _ in range(rows)]
    sizes[0], sizes[-1] = lengths[1], lengths[0]
    inputs = [ids(size) for size in sizes]
    if kind == "classification":
        return classification_batch(inputs, random.integers(0, LABELS, rows), pad_id=0)
    if kind == "seq2seq":
        return seq2seq_batch(inputs, [ids(max(2, size // 2)) for size in sizes], pad_id=0, start_id=0)
    answers = [np.arange(size) >= 2 + number % 2 for number, size in enumerate(sizes)]
    return causal_batch(inputs, answers, pad_id=0)


def loss_sum(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a training step goes backward from: cross-entropy in nats, summed over the batch's targets."""
    return step.loss_of(model, batch, step.outputs(model, batch))
