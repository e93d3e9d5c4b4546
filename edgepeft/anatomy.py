"""Where things are in a backbone, so that methods never mention module names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from edgepeft.errors import UsageError

ATTENTION = ("query", "key", "value", "output")
FEED_FORWARD = ("ffn_in", "ffn_out")
CROSS_ATTENTION = ("cross_query", "cross_key", "cross_value", "cross_output")
ROLES = (*ATTENTION, *CROSS_ATTENTION, *FEED_FORWARD)
SUB_LAYERS = {"attention": "query", "cross_attention": "cross_query", "feed_forward": "ffn_in"}  # and who reads them


@dataclass(frozen=True)
class SubLayer:
    """What a layer computes between two values of its residual stream: stream ← stream + sub-layer(stream).

    Attributes:
        reader: dotted name of a linear layer that reads the sub-layer's input (normalised where the norm comes first).
        output: dotted name of the module whose output is added to the stream, after projection, dropout and, in
            Gemma 2, a norm of its own.
        norm: dotted name of the norm of the sum where norms come after it (BERT); "" where they come before.
    """

    reader: str
    output: str
    norm: str


@dataclass(frozen=True)
class Block:
    """One transformer layer.

    Attributes:
        path: dotted name of the layer in the model.
        stack: index of the stack the layer belongs to (an encoder-decoder has two, everything else one).
        linears: for each role of ``ROLES`` that the layer has, the dotted names of its linear layers. A gated
            feed-forward has two under ``ffn_in``; a fused projection stands under each of its roles.
        norms: dotted names of the normalisations in the layer.
        sub_layers: those of ``SUB_LAYERS`` that the layer has, in the order in which it computes them.
    """

    path: str
    stack: int
    linears: Mapping[str, tuple[str, ...]]
    norms: tuple[str, ...]
    sub_layers: Mapping[str, SubLayer]


@dataclass(frozen=True)
class Stack:
    """Transformer layers that one module calls in turn: ``owner`` (dotted, "" is the model), holding ``layers``."""

    owner: str
    layers: str


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, by dotted name.

    Attributes:
        stacks: encoder before decoder.
        blocks: all layers, in the order of the stacks.
        norms: every normalisation, those of the blocks and the others.
        head: what turns hidden states into labels ("" when the model predicts tokens).
        unembedding: what turns hidden states into token logits ("" in a classifier).
    """

    stacks: tuple[Stack, ...]
    blocks: tuple[Block, ...]
    norms: tuple[str, ...]
    head: tuple[str, ...]
    unembedding: str

    def linears(self, roles: Iterable[str]) -> list[str]:
        """Dotted names of the linear layers with any of these roles, each once, in the order of the model."""
        wanted = list(roles)
        names = (name for block in self.blocks for role in wanted for name in block.linears.get(role, ()))
        return list(dict.fromkeys(names))

    def roles(self, name: str) -> frozenset[str]:
        """The roles of a linear layer; several if it is fused, none if it belongs to no block."""
        return frozenset(role for block in self.blocks for role, names in block.linears.items() if name in names)

    def sub_layers(self, kinds: Iterable[str]) -> list[SubLayer]:
        """The sub-layers of these kinds, in the order in which the model computes them."""
        wanted = set(kinds)
        return [part for block in self.blocks for kind, part in block.sub_layers.items() if kind in wanted]


@dataclass(frozen=True)
class _Layout:
    """How a family names the parts of a layer, relative to it. Fused projections are named under each role."""

    stacks: tuple[str, ...]  # relative to the base model
    roles: tuple[Mapping[str, tuple[str, ...]], ...]  # one for each stack
    outputs: tuple[Mapping[str, str], ...]  # of the sub-layers; one for each stack
    norms: Mapping[str, str] = field(default_factory=dict)  # of their sums, where norms come after them


def _attention(prefix: str, query: str, key: str, value: str, output: str) -> dict[str, tuple[str, ...]]:
    names = {"query": query, "key": key, "value": value, "output": output}
    return {role: (f"{prefix}.{name}",) for role, name in names.items()}


_LLAMA = _Layout(
    ("layers",),
    (
        {
            **_attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
            "ffn_out": ("mlp.down_proj",),
        },
    ),
    ({"attention": "self_attn.o_proj", "feed_forward": "mlp"},),
)
_GEMMA2 = _Layout(
    _LLAMA.stacks,
    _LLAMA.roles,
    ({"attention": "post_attention_layernorm", "feed_forward": "post_feedforward_layernorm"},),
)
_GTE = _Layout(  # an encoder with norms where BERT has them
    _LLAMA.stacks,
    _LLAMA.roles,
    ({"attention": "post_attention_dropout", "feed_forward": "post_mlp_dropout"},),
    {"attention": "post_attention_layernorm", "feed_forward": "post_mlp_layernorm"},
)
_PHI3 = _Layout(
    ("layers",),
    (
        {
            **_attention("self_attn", "qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
            "ffn_in": ("mlp.gate_up_proj",),
            "ffn_out": ("mlp.down_proj",),
        },
    ),
    ({"attention": "resid_attn_dropout", "feed_forward": "resid_mlp_dropout"},),
)
_PHI = _Layout(
    ("layers",),
    (
        {
            **_attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
            "ffn_in": ("mlp.fc1",),
            "ffn_out": ("mlp.fc2",),
        },
    ),
    ({"attention": "self_attn.dense", "feed_forward": "mlp"},),
)
_GPT2 = _Layout(
    ("h",),
    (
        {
            **_attention("attn", "c_attn", "c_attn", "c_attn", "c_proj"),
            "ffn_in": ("mlp.c_fc",),
            "ffn_out": ("mlp.c_proj",),
        },
    ),
    ({"attention": "attn.resid_dropout", "feed_forward": "mlp.dropout"},),
)
_BERT = _Layout(
    ("encoder.layer",),
    (
        {
            **_attention("attention", "self.query", "self.key", "self.value", "output.dense"),
            "ffn_in": ("intermediate.dense",),
            "ffn_out": ("output.dense",),
        },
    ),
    ({"attention": "attention.output.dropout", "feed_forward": "output.dropout"},),
    {"attention": "attention.output.LayerNorm", "feed_forward": "output.LayerNorm"},
)
_DISTILBERT = _Layout(
    ("transformer.layer",),
    (
        {
            **_attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
            "ffn_in": ("ffn.lin1",),
            "ffn_out": ("ffn.lin2",),
        },
    ),
    ({"attention": "attention.out_lin", "feed_forward": "ffn"},),
    {"attention": "sa_layer_norm", "feed_forward": "output_layer_norm"},
)
_T5_SELF = _attention("layer.0.SelfAttention", "q", "k", "v", "o")
_T5_CROSS = {f"cross_{r}": p for r, p in _attention("layer.1.EncDecAttention", "q", "k", "v", "o").items()}


def _t5_feed_forward(layer: int, gated: bool) -> dict[str, tuple[str, ...]]:
    prefix = f"layer.{layer}.DenseReluDense"
    inputs = (f"{prefix}.wi_0", f"{prefix}.wi_1") if gated else (f"{prefix}.wi",)
    return {"ffn_in": inputs, "ffn_out": (f"{prefix}.wo",)}


def _t5(gated: bool) -> _Layout:
    encoder = {**_T5_SELF, **_t5_feed_forward(1, gated)}
    decoder = {**_T5_SELF, **_T5_CROSS, **_t5_feed_forward(2, gated)}
    outputs = {"attention": "layer.0.dropout", "feed_forward": "layer.1.dropout"}
    crossed = {"attention": "layer.0.dropout", "cross_attention": "layer.1.dropout", "feed_forward": "layer.2.dropout"}
    return _Layout(("encoder.block", "decoder.block"), (encoder, decoder), (outputs, crossed))


# A model fits the first layout whose every name it has, so that new architectures of a known build need no entry.
_LAYOUTS = (_GEMMA2, _GTE, _LLAMA, _PHI3, _PHI, _GPT2, _BERT, _DISTILBERT, _t5(gated=False), _t5(gated=True))

# Fit one by their names, and not by what their modules take and give.
_LIKE_IN_NAME = {
    "openai-gpt": "Its layers return lists, where those of GPT-2, whose names they have, return states.",
    "ibert": "Its linear layers return the scale of their integers beside their outputs.",
    "xmod": "Its layers ask for the language of every text.",
}


def find(model: nn.Module) -> Anatomy:
    """The anatomy of a Hugging Face model.

    Raises:
        UsageError: its architecture is of none of the known builds.
    """
    hub_model: Any = model
    base = hub_model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    modules = {name.removeprefix(prefix): module for name, module in model.named_modules() if name.startswith(prefix)}
    layout = next((layout for layout in _LAYOUTS if _fits(layout, modules)), None)
    unlike = _LIKE_IN_NAME.get(hub_model.config.model_type)
    if layout is None or unlike is not None:
        raise UsageError(
            f"The architecture {type(model).__name__} is not one edgepeft knows.",
            unlike
            or "Methods need to know where attention and feed-forward layers are, "
            "and no known layout matches its modules.",
            "Known builds: BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral, Qwen, Gemma, Phi, T5. "
            "A new one is a layout in edgepeft/anatomy.py.",
        )
    _check_alike(model, layout, modules)
    blocks = []
    for index, (stack, roles) in enumerate(zip(layout.stacks, layout.roles, strict=True)):
        layers: Any = modules[stack]
        for number in range(len(layers)):
            path = f"{stack}.{number}"
            linears = {role: tuple(f"{prefix}{path}.{name}" for name in names) for role, names in roles.items()}
            norms = tuple(prefix + name for name in modules if name.startswith(f"{path}.") and is_norm(modules[name]))
            sub_layers = {
                kind: SubLayer(
                    reader=linears[SUB_LAYERS[kind]][0],
                    output=f"{prefix}{path}.{output}",
                    norm=f"{prefix}{path}.{layout.norms[kind]}" if layout.norms else "",
                )
                for kind, output in layout.outputs[index].items()
            }
            blocks.append(Block(prefix + path, index, linears, norms, sub_layers))
    unembedding = _name_of(model, hub_model.get_output_embeddings())
    return Anatomy(
        stacks=tuple(Stack((prefix + s).rpartition(".")[0], prefix + s) for s in layout.stacks),
        blocks=tuple(blocks),
        norms=tuple(name for name, module in model.named_modules() if is_norm(module)),
        head=() if unembedding else tuple(n for n, _ in model.named_children() if not f"{n}.".startswith(prefix)),
        unembedding=unembedding,
    )


def body(model: nn.Module, parts: Anatomy) -> list[str]:
    """The modules that a checkpoint brings, whatever sits on them: layers, norms and embeddings.

    The rest is what classifies or predicts tokens, with what leads there, such as BERT's pooler.
    """
    return [*(block.path for block in parts.blocks), *parts.norms, *embeddings(model)]


def embeddings(model: nn.Module) -> list[str]:
    """The modules that look vectors up: of tokens, positions and their like."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a weight (LayerNorm, RMSNorm and their like)."""
    return type(module).__name__.lower().endswith("norm") and getattr(module, "weight", None) is not None


def _fits(layout: _Layout, modules: Mapping[str, nn.Module]) -> bool:
    return all(f"{stack}.0.{name}" in modules for stack, names in _named(layout).items() for name in names)


def _named(layout: _Layout) -> dict[str, list[str]]:
    """For each stack what every layer of it must have."""
    return {
        stack: [*(name for names in roles.values() for name in names), *outputs.values(), *layout.norms.values()]
        for stack, roles, outputs in zip(layout.stacks, layout.roles, layout.outputs, strict=True)
    }


def _check_alike(model: nn.Module, layout: _Layout, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model of which only the first layer is of a known build.

    Raises:
        UsageError: see above.
    """
    for stack, names in _named(layout).items():
        layers: Any = modules[stack]
        for number, name in ((number, name) for number in range(len(layers)) for name in names):
            if f"{stack}.{number}.{name}" not in modules:
                raise UsageError(
                    f"The layers of {type(model).__name__} are not all of one build.",
                    f"The first has {name}, and number {number + 1} has not: it may be a mixture of experts.",
                    "Use a model whose layers are all alike.",
                )


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if wanted is not None and module is wanted), "")
