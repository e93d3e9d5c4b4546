"""What a model answers to held-out questions: greedy decoding, which keeps the keys and values of what was read.

An evaluation has some questions answered, one at a time, so that its memory does not grow with the microbatch.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgepeft import foreign
from edgepeft.chat import end_of_turn
from edgepeft.files import write_json
from edgepeft.runtime.text import StopStrings

if TYPE_CHECKING:  # plans, which answer too, do not wait for the libraries of data
    from edgepeft.data import Data, Example

ASKED = 4  # questions of an evaluation
TOKENS = 24  # of an answer at most
QUESTION, REFERENCE = "question", "reference"  # what a file of answers has beside artefacts


@dataclass(frozen=True)
class Questions:
    """The first held-out examples of a task that generates text, and none of another.

    Attributes:
        most: tokens of an answer: those of the longest reference, up to ``TOKENS``, as far as no example is longer.
        ends, stop: tokens and texts that training closed answers with.
    """

    examples: Sequence[Example]
    most: int
    tokenizer: Any
    ends: Collection[int] = ()
    stop: Sequence[str] = ()

    @classmethod
    def of(cls, data: Data, count: int = ASKED) -> Questions:
        """The first ``count``, or as many as there are."""
        if data.task == "classification":
            return cls([], 0, data.tokenizer)
        examples = data.validation.examples(range(min(count, len(data.validation))))
        most = min(TOKENS, max(len(example.target_ids) for example in examples))
        if data.task == "causal-lm":
            longest = max(len(example.prompt_ids) for example in examples)
            most = min(most, int(data.validation.lengths.max()) - longest)
        return cls(examples, most, data.tokenizer, *_closed_by(data.tokenizer, data.template))

    def ending(self, model: nn.Module) -> list[int]:
        """Tokens that end an answer: those of training, and those of the model's own generation settings."""
        return sorted({*self.ends, *stops(model)})

    def answered(self, model: Any) -> list[str]:
        """The answers of a model as text."""
        ends = self.ending(model) if self.examples else []
        return self.texts([greedy(model, example.prompt_ids, self.most, ends) for example in self.examples])

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The tokens of answers as text, up to where a device stops."""
        return [self._until_stop(text) for text in self._decoded(answers)]

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in rows]

    def _until_stop(self, text: str) -> str:
        stops = StopStrings(self.stop)
        return stops.push(text) + stops.flush()

    def note(self, path: Path, **answers: Sequence[str]) -> None:
        """Keep the answers of artefacts, beside the questions and what should have been answered, in a JSON file."""
        if not self.examples:
            return
        known = {
            QUESTION: self._decoded([example.prompt_ids for example in self.examples]),
            REFERENCE: [example.reference for example in self.examples],
        }
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        longer = {name: texts for name, texts in known.items() if len(texts) > len(before.get(name, []))}
        write_json(path, {**before, **longer, **answers})


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], most: int, ends: Collection[int]) -> list[int]:
    """The likeliest tokens after a prompt, the one that ends the answer included. The model stays in its mode.

    Args:
        most: tokens of the answer.
    """
    training = model.training
    model.eval()
    found: list[int] = []
    for token in itertools.islice(next_tokens(model, torch.tensor([list(prompt)], device=model.device)), most):
        found.append(int(token))
        if found[-1] in ends:
            break
    model.train(training)
    return found


@torch.no_grad()
def next_tokens(model: Any, ids: Tensor, begun: Tensor | None = None) -> Iterator[Tensor]:
    """The likeliest token (1,) after a prompt (1, tokens), the one after that, and so on without end.

    Values are not looked at, so that the planner can run this on fake tensors.

    Args:
        begun: what an encoder-decoder has said already, (1, tokens); nothing when not given.
    """
    if foreign.wraps(model):
        yield from _reading_anew(model, ids, begun)
        return
    source: dict[str, Any] = {}
    name, now = "input_ids", ids
    if model.config.is_encoder_decoder:
        source = {"encoder_outputs": model.get_encoder()(input_ids=ids)}
        name, now = "decoder_input_ids", ids.new_full((1, 1), start(model.config))
        now = now if begun is None else torch.cat([now, begun], dim=1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        source["logits_to_keep"] = 1
    states = None
    while True:
        found = model(**{name: now}, past_key_values=states, use_cache=True, **source)
        states = found.past_key_values
        now = found.logits[:, -1:].argmax(-1)
        yield now[0]


def _reading_anew(model: Any, ids: Tensor, begun: Tensor | None) -> Iterator[Tensor]:
    """The same without kept states, which the wrappers of HF PEFT that prompt a model make anew for every text."""
    answers = model.config.is_encoder_decoder
    read = ids.new_full((1, 1), start(model.config)) if answers else ids
    read = read if begun is None else torch.cat([read, begun], dim=1)
    while True:
        given = {"input_ids": ids, "decoder_input_ids": read} if answers else {"input_ids": read}
        now = model(**given, use_cache=False).logits[:, -1:].argmax(-1)
        yield now[0]
        read = torch.cat([read, now], dim=1)


def start(config: Any) -> int:
    """The token that a decoder begins with: of a T5 that names none, its padding."""
    named = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id if named is None else named)


def _closed_by(tokenizer: Any, template: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    """The tokens, and the text that is not one token, with which training closes an answer."""
    marker = end_of_turn(template).strip() if template["kind"] == "chat" else ""
    tokens = tokenizer(marker, add_special_tokens=False)["input_ids"] if marker else []
    single = tokens if len(tokens) == 1 else []
    return [tokenizer.eos_token_id, *single], [marker] if marker and not single else []


def stops(model: nn.Module) -> list[int]:
    """Tokens that end an answer, as the model's generation settings have it."""
    made: Any = model
    found = getattr(made, "generation_config", None)
    ends = found.eos_token_id if found is not None and found.eos_token_id is not None else made.config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [int(ends)]
