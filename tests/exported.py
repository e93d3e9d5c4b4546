"""Tiny real models with random weights, their tokenizers and their ONNX graphs, made once per test run."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

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
    # The trainers of the other two kinds order equals by hash, differently in each process; so these take words as given.
    words = " ".join(CORPUS).split()
    pieces = sorted({*words[::2], *"".join(words)})
    if task == "classification":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        vocabulary = [*specials, *dict.fromkeys(piece.lower() for piece in pieces), *(f"##{c}" for c in "abcdefghijklm")]
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
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=MAX_TOKENS,
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


class _Classifier(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class _Causal(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return (output.logits, *[t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)])


class _Encoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        hidden = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cross = []
        for block in self.model.decoder.block:
            attention = block.layer[1].EncDecAttention
            for linear in (attention.k, attention.v):
                cross.append(linear(hidden).view(*hidden.shape[:2], -1, attention.key_value_proj_dim).transpose(1, 2))
        return tuple(cross)


class _Decoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids, encoder_attention_mask, *kv):
        n = len(kv) // 4
        own, cross = DynamicCache(), DynamicCache()
        for i in range(n):
            own.update(kv[2 * i], kv[2 * i + 1], i)
            cross.update(kv[2 * n + 2 * i], kv[2 * n + 2 * i + 1], i)
        cache = EncoderDecoderCache(own, cross)
        for i in range(n):
            cache.is_updated[i] = True
        shape = encoder_attention_mask[..., None].float().expand(-1, -1, self.model.config.d_model)
        output = self.model.decoder(input_ids=decoder_input_ids, encoder_hidden_states=shape, encoder_attention_mask=encoder_attention_mask, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state
        if getattr(self.model.config, "scale_decoder_outputs", self.model.config.tie_word_embeddings):
            hidden = hidden * self.model.model_dim**-0.5
        layers = output.past_key_values.self_attention_cache.layers
        return (self.model.lm_head(hidden), *[t for layer in layers for t in (layer.keys, layer.values)])


def _names(prefix):
    return [f"{prefix}.{i}.{k}" for i in range(2) for k in ("key", "value")]


def _onnx(module, args, names, outputs, shapes, path):
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.onnx.export(module, args, path, input_names=names, output_names=outputs, dynamic_shapes=shapes, dynamo=True, external_data=True, verbose=False)


def export(made, task, directory):
    b, t, e, p = Dim("batch"), Dim("tokens"), Dim("encoded"), Dim("past")
    ids = torch.randint(3, 100, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if task == "classification":
        _onnx(_Classifier(made), (ids, mask), ["input_ids", "attention_mask"], ["logits"], ({0: b, 1: t}, {0: b, 1: t}), directory / "model.onnx")
    elif task == "causal-lm":
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :2] = 0
        ids = ids[:, :4]
        past = [torch.randn(2, 2, 5, 8) for _ in range(4)]
        pos = (mask.cumsum(-1) - 1).clamp(min=0)[:, 5:]
        _onnx(_Causal(made), (ids, mask, pos, *past), ["input_ids", "attention_mask", "position_ids", *_names("past_key_values")], ["logits", *_names("present")],
              ({0: b, 1: t}, {0: b, 1: Dim.AUTO}, {0: b, 1: t}, tuple({0: b, 2: p} for _ in past)), directory / "model.onnx")
    else:
        _onnx(_Encoder(made), (ids, mask), ["input_ids", "attention_mask"], _names("cross"), ({0: b, 1: e}, {0: b, 1: e}), directory / "encoder.onnx")
        own = [torch.randn(2, 4, 5, 8) for _ in range(4)]
        cross = [torch.randn(2, 4, 8, 8) for _ in range(4)]
        _onnx(_Decoder(made), (ids[:, :4], mask, *own, *cross), ["decoder_input_ids", "encoder_attention_mask", *_names("past_key_values"), *_names("cross")], ["logits", *_names("present")],
              ({0: b, 1: t}, {0: b, 1: e}, tuple([{0: b, 2: p} for _ in own] + [{0: b, 2: e} for _ in cross])), directory / "decoder.onnx")


@cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="edgepeft-tests-")
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def graphs(task: str) -> Path:
    """The ONNX graphs of ``model(task)``."""
    directory = _folder() / "graphs" / task
    directory.mkdir(parents=True)
    export(model(task), task, directory)
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
