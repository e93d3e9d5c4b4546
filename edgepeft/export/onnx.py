"""A torch model becomes ONNX graphs: one for classifiers and decoders, an encoder and a decoder for T5."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from edgepeft.errors import EdgePeftError
from edgepeft.export.translate import Axes, Graph, write
from edgepeft.files import atomic_directory

# Sizes of the traced example. They differ and exceed one: a size of one, or two that agree, may be taken for a law.
BATCH, TOKENS, PAST, SOURCE = 2, 4, 5, 7


def export(model: nn.Module, task: str, directory: Path) -> list[Path]:
    """Write ``model`` (fp32, evaluation mode) to ``directory`` as ONNX graphs with dynamic batch and lengths.

    - classification: ``model.onnx``, input_ids and attention_mask (batch, tokens) → logits (batch, labels).
    - causal-lm: ``model.onnx``, input_ids and position_ids (batch, tokens), attention_mask (batch, past + tokens),
      past_key_values.N.key/.value (batch, heads, past, head_dim) → logits (batch, tokens, vocabulary) and
      present.N.key/.value. ``past`` may be 0, so the one graph serves prefill and decoding.
    - seq2seq: ``encoder.onnx``, input_ids and attention_mask (batch, source) → cross.N.key/.value;
      ``decoder.onnx``, decoder_input_ids (batch, tokens), encoder_attention_mask (batch, source), past_key_values.N.*
      and cross.N.* → logits and present.N.*.

    Layers, heads and widths come from a run of the model, never from its config: an adapter may add cache layers of its
    own or widen the encoder's states. Weights lie in ``<graph>.onnx.data`` beside each graph.

    Returns:
        The graph files, in the order they run.

    Raises:
        EdgePeftError: the model is training, is not fp32, or cannot be translated.
    """
    if model.training or any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        raise EdgePeftError(
            "Only an fp32 model in evaluation mode can be exported.",
            f"This one is {'in training mode' if model.training else 'not in fp32'}.",
            "Merge it first (edgepeft merge), or call model.float().eval().",
        )
    builders = {"classification": _classification, "causal-lm": _causal_lm, "seq2seq": _seq2seq}
    with torch.no_grad():
        graphs = builders[task](model)
        with atomic_directory(directory) as folder:
            for graph in graphs:
                write(graph, folder / f"{graph.name}.onnx")
    return [directory / f"{graph.name}.onnx" for graph in graphs]


class _Classifier(nn.Module):
    """Logits of a classifier, (batch, labels)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        input_ids, attention_mask = inputs
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class _CausalLM(nn.Module):
    """Logits (batch, tokens, vocabulary) and the cache, which enters and leaves as a flat list of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *past = inputs
        _share_sizes(input_ids, past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=_cache(past),
            use_cache=True,
        )
        return output.logits, *_flat(output.past_key_values)


class _Encoder(nn.Module):
    """The keys and values that cross-attention reads, computed once per input.

    The model itself fills its cross cache in one step of the decoder; what else that step computes is dead code and
    does not reach the graph.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask = inputs
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :2],
            past_key_values=cache,
            use_cache=True,
        )
        return _flat(cache.cross_attention_cache)


class _Decoder(nn.Module):
    """Logits (batch, tokens, vocabulary) and the self-attention cache of an encoder-decoder, given the cross cache.

    Attributes:
        width: of the encoder's states; their values are never read once the cross cache is there, their shape is.
        layers: of the self-attention cache; the first ``2 * layers`` tensors of ``states`` are its keys and values.
    """

    def __init__(self, model: nn.Module, width: int, layers: int) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self.layers = layers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        decoder_input_ids, encoder_attention_mask, *states = inputs
        past, cross = states[: 2 * self.layers], states[2 * self.layers :]
        _share_sizes(decoder_input_ids, past)
        _share_sizes(encoder_attention_mask, cross)
        cache = EncoderDecoderCache(_cache(past), _cache(cross))
        for layer in range(len(cross) // 2):
            cache.is_updated[layer] = True
        unread = cross[0][:, 0, :, :1].expand(-1, -1, self.width)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=unread),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *_flat(output.past_key_values.self_attention_cache)


def _classification(model: nn.Module) -> list[Graph]:
    ids, mask = _example(model, TOKENS)
    axes: Axes = {0: "batch", 1: "tokens"}
    inputs = {"input_ids": (ids, axes), "attention_mask": (mask, axes)}
    return [Graph("model", _Classifier(model), inputs, ["logits"])]


def _causal_lm(model: nn.Module) -> list[Graph]:
    ids, _ = _example(model, TOKENS)
    _, mask = _example(model, PAST + TOKENS)
    positions = (mask.cumsum(-1) - 1)[:, PAST:]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    axes: Axes = {0: "batch", 1: "tokens"}
    inputs = {
        "input_ids": (ids, axes),
        "attention_mask": (mask, {0: "batch", 1: "total"}),
        "position_ids": (positions, axes),
        **_cache_inputs("past_key_values", cache, PAST, "past"),
    }
    return [Graph("model", _CausalLM(model), inputs, ["logits", *_cache_names("present", cache)])]


def _seq2seq(model: nn.Module) -> list[Graph]:
    ids, mask = _example(model, SOURCE)
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :2], use_cache=True)
    own, cross = output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache
    states = output.encoder_last_hidden_state.shape[1]  # a prompt makes the encoder give more than it is given
    source: Axes = {0: "batch", 1: "source"}
    encoder = Graph(
        "encoder",
        _Encoder(model),
        {"input_ids": (ids, source), "attention_mask": (mask, source)},
        _cache_names("cross", cross),
    )
    decoder = Graph(
        "decoder",
        _Decoder(model, output.encoder_last_hidden_state.shape[-1], len(own.layers)),
        {
            "decoder_input_ids": (ids[:, :TOKENS], {0: "batch", 1: "tokens"}),
            "encoder_attention_mask": (mask, source),
            **_cache_inputs("past_key_values", own, PAST, "past"),
            **_cache_inputs("cross", cross, states, "source" if states == SOURCE else "states"),
        },
        ["logits", *_cache_names("present", own)],
    )
    return [encoder, decoder]


def _example(model: nn.Module, tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask with padding, each (BATCH, tokens): a mask of ones would be optimised away."""
    device = next(model.parameters()).device
    ids = torch.arange(1, BATCH * tokens + 1, device=device).view(BATCH, tokens)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return ids, mask


def _cache(states: Sequence[Tensor]) -> DynamicCache:
    """A cache that already holds ``states``: keys and values of layer 0, of layer 1, and so on.

    Filled by hand since ``update`` would trace a concatenation with an empty tensor for each of them. Every layer keeps
    all its tokens, of sliding-window models too: their window is in the attention mask.
    """
    cache = DynamicCache()
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _flat(cache: DynamicCache) -> tuple[Tensor, ...]:
    return tuple(state for layer in cache.layers for state in (layer.keys, layer.values))


def _cache_names(prefix: str, cache: DynamicCache) -> list[str]:
    return [f"{prefix}.{index}.{part}" for index in range(len(cache.layers)) for part in ("key", "value")]


def _cache_inputs(prefix: str, cache: DynamicCache, length: int, axis: str) -> dict[str, tuple[Tensor, Axes]]:
    """Example states of ``length`` tokens, shaped (batch, heads, length, head_dim) like those the model itself made."""
    axes: Axes = {0: "batch", 2: axis}
    return {
        name: (torch.randn(BATCH, state.shape[1], length, state.shape[3], device=state.device), axes)
        for name, state in zip(_cache_names(prefix, cache), _flat(cache), strict=True)
    }


def _share_sizes(tokens: Tensor, states: Sequence[Tensor]) -> None:
    """Say up front that all states have one batch and one length: found out later, each costs a symbol and a proof."""
    for state in states:
        torch._check(state.shape[0] == tokens.shape[0])
        torch._check(state.shape[2] == states[0].shape[2])
