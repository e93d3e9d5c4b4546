"""How the next token is chosen from the logits: greedily, or by temperature and top-p."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepeft.errors import UsageError

Choose = Callable[[NDArray[Any]], NDArray[np.int64]]
"""Logits (batch, vocabulary) to tokens (batch,)."""


def greedy(logits: NDArray[Any]) -> NDArray[np.int64]:
    """The most likely token of each row, (batch,); the first of equals."""
    return logits.argmax(axis=-1).astype(np.int64)


def sampler(temperature: float, top_p: float = 1.0, seed: int | None = None) -> Choose:
    """A chooser of tokens; temperature 0 is greedy. The same seed gives the same tokens for the same logits.

    Raises:
        UsageError: a value outside its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"The temperature is {temperature}.", "", "Give 0 for greedy decoding, or a number above it.")
    if not 0 < top_p <= 1:
        raise UsageError(f"Top-p is {top_p}.", "It is a share of the probability.", "Give a number in (0, 1].")
    if seed is not None and seed < 0:
        raise UsageError(f"The seed is {seed}.", "", "Give a whole number from 0.")
    if temperature == 0:
        return greedy
    random = np.random.default_rng(seed)

    def choose(logits: NDArray[Any]) -> NDArray[np.int64]:
        tokens = np.empty(len(logits), np.int64)
        for row, scores in enumerate(logits):
            candidates, probabilities = distribution(scores, temperature, top_p)
            cumulative = np.cumsum(probabilities)
            drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
            tokens[row] = candidates[min(int(drawn), len(candidates) - 1)]
        return tokens

    return choose


def distribution(
    scores: NDArray[Any], temperature: float, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may follow and their probabilities, most likely first, for one row of logits (vocabulary,).

    Top-p keeps the smallest set of most likely tokens whose probability reaches ``top_p`` (Holtzman et al., 2020, "The
    Curious Case of Neural Text Degeneration").
    """
    exact = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # the likeliest is at 0 before it is divided: near 0 the others go to -inf
        probabilities = np.exp((exact - exact.max()) / temperature)
    probabilities /= probabilities.sum()
    # Tokens below this bound weigh less than 1 - top_p together, so none is in the set: sorting the whole vocabulary
    # would cost more than a small model's forward pass.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    candidates = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    kept = probabilities[candidates]
    if top_p < 1:
        before = np.cumsum(kept) - kept
        kept = kept[before < top_p]
    return candidates[: len(kept)], kept / kept.sum()
