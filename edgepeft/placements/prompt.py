"""Trained tokens before a model's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.anatomy import Anatomy
from edgepeft.placements import attention, positions
from edgepeft.placements.attention import PROMPT, RECORD
from edgepeft.placements.ladder import named

CHILD = "prompt"
COMMON = 5000  # tokens that embeddings are taken from at the start, the commonest of T5's: Lester et al., section 3.2


class Prompt(nn.Module):
    """Embeddings (length, hidden) that are trained themselves, kept in fp32."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)

    def forward(self) -> Tensor:
        return self.embeddings


def from_vocabulary(model: Any, length: int) -> Tensor:
    """Embeddings of random tokens out of the first ones, (length, hidden), fp32."""
    table = model.get_input_embeddings().weight.detach()
    chosen = torch.randint(min(COMMON, len(table)), (length,), device=table.device)
    return table[chosen].float()


def attach(method: str, model: Any, anatomy: Anatomy, prompt: nn.Module, length: int) -> None:
    """Put what ``prompt()`` gives, (length, hidden), before the input of a model, of its encoder if it has one.

    Outputs, target positions and the token that a classifier reads stay those of the input.

    A decoder reads the prompt by itself, once for the whole batch: no token of it sees the input, so its keys and
    values are the same before every row. They are put before those of each attention, in a sliding window too.

    Raises:
        UsageError: the prompt leaves no positions to the input.
    """
    positions.check(method, length, model.config)
    if attention.is_causal_decoder(model, anatomy):
        reader: Any = model.get_submodule(anatomy.stacks[0].owner)
        for site in attention.sites(model, anatomy):
            attention.reads_more(model.get_submodule(site.path))
        positions.shift(reader, length)
        reader.register_forward_pre_hook(_bring_states, with_kwargs=True)
    elif len(anatomy.stacks) == 2:
        reader = model.get_submodule(anatomy.stacks[0].owner)
        reader.register_forward_pre_hook(_prepend, with_kwargs=True)
        decoder: Any = model.get_submodule(anatomy.stacks[1].owner)
        decoder.prompt_length = length
        decoder.register_forward_pre_hook(_see_prompt, with_kwargs=True)
    else:
        reader = model.base_model
        reader.register_forward_pre_hook(_prepend, with_kwargs=True)
        layers: Any = model.get_submodule(anatomy.stacks[0].owner)
        if layers is reader:  # what pools the states is in there too
            layers = model.get_submodule(anatomy.blocks[-1].path)
        layers.prompt_length = length
        layers.register_forward_hook(_cut)
    reader.add_module(CHILD, prompt)
    reader.prompt_held = None


def of(model: nn.Module) -> nn.Module:
    """What makes the prompt of a model."""
    return _reader(model).get_submodule(CHILD)


def put(model: nn.Module, prompt: nn.Module) -> None:
    """Let another module make the prompt, of the same length."""
    setattr(_reader(model), CHILD, prompt)


@torch.no_grad()
def condense(model: nn.Module) -> None:
    """Make the prompt, and of a decoder the states that it makes of it, once and for all: constants of a graph."""
    reader = _reader(model)
    reader.prompt_held = _made(reader)


def _reader(model: nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "prompt_held"))


def _made(reader: Any) -> Any:
    """A prompt's embeddings, (1, length, hidden), or of a decoder the states it makes of them, layer by layer."""
    if reader.prompt_held is not None:
        return reader.prompt_held
    embeddings = reader.prompt()[None].to(reader.get_input_embeddings().weight.dtype)
    if not hasattr(reader, "positions_before"):
        return embeddings
    record: list[tuple[Tensor, Tensor]] = []
    reader.forward(inputs_embeds=embeddings, use_cache=False, **{RECORD: record})  # not a call: that brings the prompt
    return tuple(record)


def _bring_states(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    cache = kwargs.get("past_key_values")  # by name: the hook that shifts positions came first
    states = getattr(cache, PROMPT, None)
    if states is None:
        states = _made(decoder)
        if cache is not None:  # the next token of the same generation has the same
            setattr(cache, PROMPT, states)
    return args, {**kwargs, PROMPT: states}


def _prepend(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    given = named(encoder, args, kwargs)
    del given["self"]
    own = given.get("inputs_embeds")
    if own is None:
        own = encoder.get_input_embeddings()(given["input_ids"])
    prompt = _made(encoder)
    embeddings = torch.cat([prompt.expand(own.shape[0], -1, -1), own], dim=1)
    mask = _widened(given.get("attention_mask"), prompt.shape[1])
    return (), {**given, "input_ids": None, "inputs_embeds": embeddings, "attention_mask": mask}


def _see_prompt(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    mask = _widened(kwargs.get("encoder_attention_mask"), decoder.prompt_length)
    return args, {**kwargs, "encoder_attention_mask": mask}


def _cut(layers: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):  # of the last layer
        return output[:, layers.prompt_length :]
    output["last_hidden_state"] = output["last_hidden_state"][:, layers.prompt_length :]
    return output


def _widened(mask: Tensor | None, length: int) -> Tensor | None:
    """A mask (batch, tokens) with ``length`` visible tokens before; None stays none."""
    return None if mask is None else torch.cat([mask.new_ones(mask.shape[0], length), mask], dim=1)
