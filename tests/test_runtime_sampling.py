"""Sampling against transformers in float64, and against its own probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from edgepeft.errors import UsageError
from edgepeft.runtime import sampling


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_distribution_is_that_of_transformers_in_float64(temperature: float, top_p: float, spread: float) -> None:
    logits = np.random.default_rng(1).normal(0, spread, 300).astype(np.float32)
    scores = torch.tensor(logits[None], dtype=torch.float64)
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    expected = scores.softmax(-1)[0].numpy()
    candidates, probabilities = sampling.distribution(logits, temperature, top_p)
    found = np.zeros(300)
    found[candidates] = probabilities
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, 8).astype(np.float32)
    candidates, probabilities = sampling.distribution(logits, 0.8, 0.9)
    assert 2 < len(candidates) < 8
    draws = 20_000
    tokens = sampling.sampler(0.8, 0.9, seed=3)(np.tile(logits, (draws, 1)))
    share = np.bincount(tokens, minlength=8)[candidates] / draws
    five_sigma = 5 * np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(share - probabilities) < five_sigma).all()
    assert share.sum() == 1


def test_temperature_zero_is_greedy_and_a_low_one_nearly() -> None:
    logits = np.random.default_rng(4).normal(0, 1, (5, 50)).astype(np.float32)
    expected = torch.tensor(logits).argmax(-1).numpy()
    np.testing.assert_array_equal(sampling.sampler(0)(logits), expected)
    for low in (1e-4, 1e-320):  # a logit divided by the last is infinite
        np.testing.assert_array_equal(sampling.sampler(low, seed=0)(logits), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "temperature is -1.0"),
        ((float("nan"),), "temperature is nan"),
        ((1.0, 0.0), "Top-p is 0.0"),
        ((1.0, 1.5), "Top-p is 1.5"),
        ((1.0, 1.0, -3), "seed is -3"),
    ],
)
def test_sampling_values_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampling.sampler(*arguments)
