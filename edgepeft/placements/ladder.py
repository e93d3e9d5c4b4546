"""A side network that climbs beside a frozen stack: it reads the stack's layers and sends no gradient into them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.conv1d import linearize

CHILD = "rung"
# What each family calls its widths: hidden, feed-forward, one attention head. Heads stay as many as they were.
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "intermediate_size",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "head_dim",
    "d_kv",
)
_CACHES = {"past_key_values", "layer_past"}  # and its key-value cache


class Ladder:
    """What the rungs of one stack share during a forward pass.

    Attributes:
        state: the side state, (batch, tokens, width).
        encoder: in a decoder, the side states of the encoder, (batch, source tokens, width).
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.encoder: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ladder:
        return memo.setdefault(id(self), Ladder())


class Entry(nn.Module):
    """The foot of a ladder: the embeddings, narrowed."""

    def __init__(self, ladder: Ladder, down: nn.Linear) -> None:
        super().__init__()
        self.ladder, self.down = ladder, down


class Rung(nn.Module):
    """One side layer: s ← layer(g · s + (1 − g) · down(h)) with g = sigmoid(gate / temperature).

    Here h is the backbone layer's output. From LST (arXiv 2206.06522), section 3.2; the temperature of 0.1 is that of
    the authors' code.

    Args:
        layer: a narrow layer of the backbone's own kind.
        stride: how many times narrower the side network is.
        cache_index: the layer's place in a key-value cache, behind those of the backbone.
    """

    temperature = 0.1

    def __init__(self, ladder: Ladder, layer: nn.Module, down: nn.Linear, stride: int, cache_index: int) -> None:
        super().__init__()
        self.ladder, self.layer, self.down = ladder, layer, down
        self.stride, self.cache_index = stride, cache_index
        self.gate = nn.Parameter(torch.zeros((), device=down.weight.device, dtype=down.weight.dtype))
        self.beside = 0  # the backbone layer's own place in that cache
        module: Any
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                self.beside, module.layer_idx = module.layer_idx, cache_index

    def forward(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The next side state, from the backbone layer's output (batch, tokens, hidden) and its own arguments."""
        gate = torch.sigmoid(self.gate / self.temperature)
        assert self.ladder.state is not None, "the ladder was entered"
        mixed = gate * self.ladder.state + (1 - gate) * self.down(hidden)
        if arguments.get("position_embeddings") is not None:
            # Every stride-th rotary frequency of the wide head is exactly the frequencies of the narrow head.
            arguments["position_embeddings"] = tuple(t[..., :: self.stride] for t in arguments["position_embeddings"])
        if arguments.get("encoder_hidden_states") is not None:
            arguments["encoder_hidden_states"] = self.ladder.encoder
        for name in _CACHES & arguments.keys():
            if arguments[name] is not None:
                _make_room(arguments[name], self.beside, self.cache_index)
        output = self.layer(mixed, **arguments)
        self.ladder.state = output if isinstance(output, Tensor) else output[0]
        return self.ladder.state


class Top(nn.Module):
    """The head of a ladder: what the side network adds to the backbone's last hidden states; nothing at first."""

    def __init__(self, norm: nn.LayerNorm, up: nn.Linear) -> None:
        super().__init__()
        self.norm, self.up = norm, up

    def forward(self, state: Tensor) -> Tensor:
        return self.up(self.norm(state))


class Bridge(nn.Module):
    """From an encoder's ladder to its decoder's: side states ride behind the encoder's hidden states, widening them."""

    def __init__(self, ladder: Ladder, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.ladder, self.norm = ladder, norm


def narrow_layer(layer: nn.Module, config: Any, stride: int, index: int, like: Tensor) -> nn.Module:
    """A layer of the same kind with hidden, feed-forward and head widths divided by ``stride``, randomly initialised.

    Its parameters are on the device of ``like`` and of its dtype.
    """
    narrow = copy.deepcopy(config)
    for name, value in config.to_dict().items():  # real fields only: a family's aliases would be divided twice
        if name in _WIDTHS and isinstance(value, int):
            setattr(narrow, name, value // stride)
    arguments: dict[str, Any] = {"layer_idx": index} if "layer_idx" in inspect.signature(type(layer)).parameters else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)  # built right from the start: fake parameters cannot be moved afterwards
    try:
        with like.device:
            built = type(layer)(narrow, **arguments)
    finally:
        torch.set_default_dtype(default)
    linearize(built)
    return built


def enter(layer: nn.Module, entry: Entry) -> None:
    """Start a ladder at the input of a stack's first layer."""
    layer.add_module("entry", entry)
    layer.register_forward_pre_hook(_enter, with_kwargs=True)


def step_beside(layer: nn.Module, rung: Rung, top: Top | None = None) -> None:
    """Put a rung beside a backbone layer; with ``top``, its state is added to the layer's output."""
    layer.add_module(CHILD, rung)
    if top is not None:
        layer.add_module("top", top)
    layer.register_forward_hook(_climb, with_kwargs=True)


def bridge(final_norm: nn.Module, link: Bridge) -> None:
    """Widen an encoder's output by its side states."""
    final_norm.add_module("bridge", link)
    final_norm.register_forward_hook(_cross)


def split_widening(layer: Any, ladder: Ladder, width: int) -> None:
    """Show a backbone decoder layer the first ``width`` features of widened encoder states, the ladder the rest."""
    layer.widening = (ladder, width)
    layer.register_forward_pre_hook(_narrow_encoder_states, with_kwargs=True)


def named(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name."""
    return {**dict(zip(inspect.signature(type(layer).forward).parameters, (layer, *args), strict=False)), **kwargs}


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    entry: Any = layer.entry
    hidden = args[0] if args else kwargs["hidden_states"]
    entry.ladder.state = entry.down(hidden)


def _climb(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    rung: Any = layer.get_submodule(CHILD)
    hidden = output if isinstance(output, Tensor) else output[0]
    arguments = named(layer, args, kwargs)
    for name in ("self", "hidden_states", "use_cache"):
        arguments.pop(name, None)
    if not isinstance(output, Tensor) and "position_bias" in arguments:  # T5: the first layer computes them for all
        arguments["position_bias"], arguments["encoder_decoder_position_bias"] = output[1], output[2]
    state = rung(hidden, arguments)
    top = dict(layer.named_children()).get("top")
    if top is None:
        return output
    rung.ladder.state = rung.ladder.encoder = None
    hidden = hidden + top(state)
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _cross(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    link: Any = norm.bridge
    state, link.ladder.state = link.ladder.state, None
    return torch.cat([output, link.norm(state)], dim=-1)


def _narrow_encoder_states(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    given = named(layer, args, kwargs)
    given.pop("self")
    wide = given.get("encoder_hidden_states")
    if wide is not None:  # the backbone's part is frozen: detached, so that no graph grows through its cross-attention
        ladder, width = layer.widening
        ladder.encoder = wide[..., width:]
        given["encoder_hidden_states"] = wide.detach()[..., :width]
    return (), given


def _make_room(cache: Any, beside: int, index: int) -> None:
    """Give a cache made for the backbone's layers room for the side layers behind them.

    Each needs one of its wide layer's kind, as they share a mask.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )
    for part in parts:
        while len(part.layers) <= index:
            window = getattr(part.layers[beside], "sliding_window", None) if len(part.layers) == index else None
            kind = type(part.layers[beside]) if window else DynamicCache().layer_class_to_replicate
            part.layers.append(kind(sliding_window=window) if window else kind())
