"""The largest inputs that a configuration allows: what is traced, and what is measured against it."""

from __future__ import annotations

from typing import Any

import torch

from edgepeft import answers
from edgepeft.surface import Configuration


def batch(configuration: Configuration) -> dict[str, torch.Tensor]:
    """A microbatch: no padding, every token a target."""
    size, tokens = configuration.microbatch, configuration.tokens
    ids = torch.ones(size, tokens, dtype=torch.long)
    found = {"input_ids": ids, "attention_mask": torch.ones(size, tokens, dtype=torch.long)}
    if configuration.task == "classification":
        return {**found, "labels": torch.ones(size, dtype=torch.long)}
    if configuration.task == "seq2seq":
        tokens = configuration.target_tokens
        found["decoder_input_ids"] = torch.ones(size, tokens, dtype=torch.long)
    # Every token a target is the most a batch can ask for.
    every = torch.arange(size * tokens)
    return {**found, "target_positions": every, "target_ids": torch.ones(size * tokens, dtype=torch.long)}


@torch.no_grad()
def answer(configuration: Configuration, model: Any) -> None:
    """Let the model answer a question whose answer's last token is the last that there may be.

    All tokens but that are read at once, as a question or as an answer that has begun: no other way holds more.
    """
    if configuration.task == "classification":
        return
    training = model.training
    model.eval()
    if configuration.task == "seq2seq":
        said = min(answers.TOKENS, configuration.target_tokens) - 2
        question = torch.ones(1, configuration.tokens, dtype=torch.long)
        tokens = answers.next_tokens(model, question, torch.ones(1, max(0, said), dtype=torch.long))
    else:
        tokens = answers.next_tokens(model, torch.ones(1, max(1, configuration.tokens - 1), dtype=torch.long))
    for _ in range(2):
        next(tokens)
    model.train(training)
