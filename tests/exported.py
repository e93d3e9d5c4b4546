"""Tiny real models with random weights, their tokenizers and their ONNX graphs, made once per test run."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from edgepeft.export import onnx
from edgepeft.export.package import package

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "A film that is good, bad, or neither; who knows?",
    "Grüße aus Köln, façade, naïve, 東京 と 大阪, привет мир, 👩‍💻🚀",
    "def f(x): return {'a': [x], 'b': 12.5}",
] * 4
CHAT = {
    "kind": "chat",
    "start": "",
    "default_system": "",
    "roles": {role: [f"<|im_start|>{role}\n", "<|im_end|>\n"] for role in ("system", "user", "assistant")},
    "generation_prompt": "<|im_start|>assistant\n",
    "trim": False,
}
PLAIN = {"kind": "plain"}
LABELS = ["negative", "neutral", "positive"]
MAX_TOKENS = 96


@cache
def tokenizer(task: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE for causal-lm, WordPiece for classification, SentencePiece-like Unigram for seq2seq."""
    if task == "causal-lm":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(CORPUS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    # The trainers of the other two kinds order equals differently in each process; so these take their words as given.
    words = " ".join(CORPUS).split()
    pieces = sorted({*words[::2], *"".join(words)})
    if task == "classification":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        vocabulary = [
            *specials,
            *dict.fromkeys(piece.lower() for piece in pieces),
            *(f"##{c}" for c in "abcdefghijklm"),
        ]
        made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        # Length settings that a training run left behind must not reach the device.
        made.enable_truncation(8)
        made.enable_padding(length=8)
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
    scored = [(piece, -float(len(pieces)) / len(piece)) for piece in ["▁", *(f"▁{word}" for word in pieces), *pieces]]
    made = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@cache
def model(task: str) -> PreTrainedModel:
    """Two layers of width 32, with weights so much larger than usual that the likeliest token is a clear choice."""
    torch.manual_seed(0)
    vocab_size = len(tokenizer(task))
    made: PreTrainedModel
    if task == "causal-lm":
        # Absolute positions: a padded prompt with wrong ones would be found out, as Llama's relative ones would not.
        made = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=MAX_TOKENS,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    elif task == "classification":
        made = BertForSequenceClassification(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                num_labels=len(LABELS),
            )
        )
    else:
        made = T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocab_size,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                tie_word_embeddings=False,
                decoder_start_token_id=0,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:  # T5 starts smaller, and with a large embedding it would repeat one token for ever
                parameter.mul_(12 if task == "seq2seq" and "block" in name else 3)
    return made.eval()


def greedy_tokens(
    task: str, ids: NDArray[np.int64], mask: NDArray[np.int64], count: int, eos: int | None
) -> NDArray[np.int64]:
    """What transformers generates greedily, (batch, tokens), without the prompt or the decoder's start token."""
    made = model(task)
    made.generation_config.eos_token_id = None  # it would stand in for an ``eos`` of None
    start = ids.shape[1] if task == "causal-lm" else 1
    found: torch.Tensor = made.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        generation_config=GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0 if eos is None else eos,
            decoder_start_token_id=made.config.decoder_start_token_id if task == "seq2seq" else None,
        ),
    )
    tokens: NDArray[np.int64] = found[:, start:].numpy()
    return tokens


@cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="edgepeft-tests-")
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def graphs(task: str) -> Path:
    """The ONNX graphs of ``model(task)``."""
    directory = _folder() / "graphs" / task
    onnx.export(model(task), task, directory)
    return directory


def arguments(task: str, target: Path) -> dict[str, Any]:
    """What ``package`` needs for ``model(task)``."""
    config = model(task).config
    return {
        "graphs": graphs(task),
        "tokenizer": tokenizer(task),
        "task": task,
        "labels": LABELS if task == "classification" else None,
        "template": CHAT if task == "causal-lm" else PLAIN,
        "eos_token_ids": [] if task == "classification" else [config.eos_token_id],
        "stop": [],
        "closing_token_ids": [],
        "decoder_start_token_id": config.decoder_start_token_id if task == "seq2seq" else None,
        "max_tokens": MAX_TOKENS,
        "name": f"tiny-{task}",
        "method": "lora",
        "variant": "fp32",
        "metrics": {"loss": 1.5},
        "target": target,
    }


@cache
def folder(task: str) -> Path:
    """The device folder of ``model(task)``. Tests that change it copy it first."""
    return package(**arguments(task, _folder() / "device" / task))
