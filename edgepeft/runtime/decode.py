"""The generation loop over ONNX graphs with a key-value cache, for one prompt or a batch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgepeft.errors import EdgePeftError
from edgepeft.runtime import sampling
from edgepeft.runtime.manifest import PREFILL_TOKENS
from edgepeft.runtime.sessions import Graph

Logits = NDArray[np.float32]
"""(batch, vocabulary), of the next token."""
Tokens = NDArray[np.int64]
Steps = Generator[Logits, Tokens, None]
"""Yields the logits of the next token, is sent the tokens (batch,) that were chosen, and so on without end."""

_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}  # onnx.TensorProto.DataType


def causal_steps(graph: Graph, input_ids: Tokens, attention_mask: Tokens) -> Steps:
    """Decoder-only generation.

    Args:
        graph: takes input_ids, attention_mask, maybe position_ids, and past_key_values.N.key and .value.
        input_ids: (batch, tokens); shorter prompts are padded on the left.
        attention_mask: (batch, tokens); 0 where padded.
    """
    past = _empty_past(graph, len(input_ids))
    tokens, mask, cached = input_ids, attention_mask, 0
    while True:
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
        for start in range(0, tokens.shape[1], PREFILL_TOKENS):
            piece = tokens[:, start : start + PREFILL_TOKENS]
            end = cached + piece.shape[1]
            feed = {"input_ids": piece, "attention_mask": mask[:, :end]}
            if "position_ids" in graph.inputs:
                feed["position_ids"] = positions[:, cached:end]
            logits, past = _step(graph, feed, past)
            cached = end
        tokens = (yield logits)[:, None]
        mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)


def seq2seq_steps(
    encoder: Graph, decoder: Graph, decoder_start_token_id: int, input_ids: Tokens, attention_mask: Tokens
) -> Steps:
    """Encoder-decoder generation; the encoder and the cross-attention's keys and values are computed once.

    Args:
        encoder: takes input_ids and attention_mask, gives cross.N.key and .value.
        decoder: takes decoder_input_ids, encoder_attention_mask, cross.N.* and past_key_values.N.*.
        decoder_start_token_id: the first decoder input.
        input_ids: (batch, tokens), padded on either side.
        attention_mask: (batch, tokens); 0 where padded.
    """
    cross = encoder.run({"input_ids": input_ids, "attention_mask": attention_mask})
    past = _empty_past(decoder, len(input_ids))
    tokens = np.full((len(input_ids), 1), decoder_start_token_id, np.int64)
    while True:
        feed = {"decoder_input_ids": tokens, "encoder_attention_mask": attention_mask}
        logits, past = _step(decoder, {**feed, **cross}, past)
        tokens = (yield logits)[:, None]


def steps(
    graphs: Mapping[str, Graph], input_ids: Tokens, attention_mask: Tokens, decoder_start_token_id: int | None = None
) -> Steps:
    """``seq2seq_steps`` where there is an encoder, else ``causal_steps``. ``graphs`` are those of ``open_graphs``."""
    if "encoder" not in graphs:
        return causal_steps(graphs["model"], input_ids, attention_mask)
    if decoder_start_token_id is None:
        raise ValueError("an encoder-decoder model needs its decoder_start_token_id")
    return seq2seq_steps(graphs["encoder"], graphs["decoder"], decoder_start_token_id, input_ids, attention_mask)


def generate(
    steps: Steps, choose: sampling.Choose, max_new_tokens: int, eos_token_ids: Sequence[int] = ()
) -> Iterator[Tokens]:
    """Yield the tokens (batch,) of each step, until every row has ended or ``max_new_tokens`` are there.

    A row that ended goes on with its end token; the end token is yielded.

    Raises:
        EdgePeftError: the logits are not numbers.
    """
    if max_new_tokens < 1:
        return
    logits = next(steps)
    ended = np.zeros(len(logits), bool)
    last = np.zeros(len(logits), np.int64)
    for count in range(1, max_new_tokens + 1):
        if np.isnan(logits).any():
            raise EdgePeftError(
                f"The model's output is not a number at generated token {count}.",
                "Its weights are damaged, or overflow at this precision.",
                "Use another precision's graph, or train again.",
            )
        last = np.where(ended, last, choose(logits))
        yield last
        ended |= np.isin(last, eos_token_ids)
        if ended.all() or count == max_new_tokens:
            return
        logits = steps.send(last)


def greedy(
    graphs: Mapping[str, Graph],
    input_ids: Tokens,
    attention_mask: Tokens,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    decoder_start_token_id: int | None = None,
) -> Tokens:
    """The most likely tokens after each prompt, (batch, at most ``max_new_tokens``), without the prompt.

    Arguments are those of ``steps`` and ``generate``; a row that ended is filled up with its end token.
    """
    loop = steps(graphs, input_ids, attention_mask, decoder_start_token_id)
    return np.stack(list(generate(loop, sampling.greedy, max_new_tokens, eos_token_ids)), axis=1)


def _empty_past(graph: Graph, batch: int) -> dict[str, ort.OrtValue]:
    """A cache of no tokens: (batch, heads, 0, head_dim) for each past_key_values input."""
    past = {}
    for name, node in graph.inputs.items():
        if not name.startswith("past_key_values."):
            continue
        _, heads, _, head_dim = node.shape
        if not (isinstance(heads, int) and isinstance(head_dim, int)):
            raise EdgePeftError(
                f"{graph.path} leaves the size of its cache open.",
                f"{name} has the shape {node.shape}: heads and head size must be numbers.",
                "Export it with these two sizes fixed.",
            )
        past[name] = ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, 0, head_dim], _ELEMENT_TYPES[node.type])
    return past


def _step(
    graph: Graph, feed: Mapping[str, Any], past: dict[str, ort.OrtValue]
) -> tuple[Logits, dict[str, ort.OrtValue]]:
    """The logits after the last token of ``feed``, and the cache with its tokens added."""
    outputs = graph.run({**feed, **past})
    logits = outputs.pop("logits").numpy()[:, -1].astype(np.float32)
    return logits, _as_past(outputs)


def _as_past(outputs: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
    return {name.replace("present.", "past_key_values.", 1): value for name, value in outputs.items()}


def causal_logits(graph: Graph, tokens: Tokens, wanted: Tokens) -> NDArray[np.float32]:
    """The logits (wanted, vocabulary) after some of a text's ``tokens`` (tokens,), read in pieces as a long prompt is.

    Args:
        wanted: ascending positions in the text.
    """
    found, past = [], _empty_past(graph, 1)
    for start in range(0, len(tokens), PREFILL_TOKENS):
        end = min(start + PREFILL_TOKENS, len(tokens))
        feed: dict[str, Any] = {"input_ids": tokens[None, start:end], "attention_mask": np.ones((1, end), np.int64)}
        if "position_ids" in graph.inputs:
            feed["position_ids"] = np.arange(start, end)[None]
        outputs = graph.run({**feed, **past})
        logits = outputs.pop("logits").numpy()[0]
        found.append(logits[wanted[(wanted >= start) & (wanted < end)] - start].astype(np.float32))
        past = _as_past(outputs)
    return np.concatenate(found)


def seq2seq_logits(
    encoder: Graph, decoder: Graph, tokens: Tokens, decoder_tokens: Tokens, wanted: Tokens
) -> NDArray[np.float32]:
    """The decoder's logits (wanted, vocabulary) after some of its ``decoder_tokens``, for the source ``tokens``."""
    mask = np.ones((1, len(tokens)), np.int64)
    cross = encoder.run({"input_ids": tokens[None], "attention_mask": mask})
    feed = {"decoder_input_ids": decoder_tokens[None], "encoder_attention_mask": mask}
    return decoder.run({**feed, **cross, **_empty_past(decoder, 1)})["logits"].numpy()[0][wanted].astype(np.float32)
