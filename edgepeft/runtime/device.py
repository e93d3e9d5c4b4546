"""A device folder, loaded: classification and streamed generation without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from edgepeft.chat import render
from edgepeft.errors import EdgePeftError, UsageError
from edgepeft.runtime import decode, manifest
from edgepeft.runtime.sampling import sampler
from edgepeft.runtime.sessions import Graph, open_graphs
from edgepeft.runtime.text import Detokenizer, StopStrings, unclosed

MOST_THREADS = 4  # for each core: more gain nothing, and many thousands take all memory
Prompt = str | Sequence[dict[str, str]]
"""A text, or messages {"role", "content"} for a model with a chat template."""


class Generation(Iterator[str]):
    """The pieces of a text as they are generated.

    Attributes:
        tokens: tokens generated so far, the end token included.
    """

    def __init__(
        self,
        tokens: Iterator[decode.Tokens],
        eos_token_ids: Sequence[int],
        detokenizer: Detokenizer,
        stops: StopStrings,
    ) -> None:
        self.tokens = 0
        self._pieces = self._stream(tokens, eos_token_ids, detokenizer, stops)

    def __next__(self) -> str:
        return next(self._pieces)

    def _stream(
        self,
        tokens: Iterator[decode.Tokens],
        eos_token_ids: Sequence[int],
        detokenizer: Detokenizer,
        stops: StopStrings,
    ) -> Iterator[str]:
        for row in tokens:
            self.tokens += 1
            token = int(row[0])
            # The end token need not be a special one for the tokenizer, so the loop keeps it out of the text.
            if token not in eos_token_ids and (piece := stops.push(detokenizer.push(token))):
                yield piece
            if stops.stopped:
                return
        if rest := stops.push(detokenizer.flush()) + stops.flush():
            yield rest


class Device:
    """A model ready to answer. Use ``Device.load``."""

    def __init__(self, manifest: manifest.Manifest, tokenizer: Tokenizer, graphs: dict[str, Graph]) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.graphs = graphs

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> Device:
        """Check and load a device folder.

        Args:
            path: the folder.
            threads: threads within one operator; None takes one per physical core.

        Raises:
            UsageError: ``path`` is not a device folder, or ``threads`` is below 1 or far above the cores.
            EdgePeftError: a file is missing, corrupt, or not what the manifest says.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"The number of threads is {threads}.", "", "Give 1 or more.")
        cores = os.cpu_count() or 1
        if threads is not None and threads > MOST_THREADS * cores:
            raise UsageError(
                f"The number of threads is {threads}.",
                f"Each takes memory, and this machine has {cores} cores.",
                f"Give {cores} or less; without --threads it is one per physical core.",
            )
        directory = Path(path)
        found = manifest.read(directory)
        file = directory / manifest.TOKENIZER
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise EdgePeftError(f"{file} could not be read.", str(error), "Export again.") from error
        graphs = open_graphs(directory, found.task, threads)
        if found.labels is not None:
            outputs = graphs["model"].outputs["logits"].shape[-1]
            if outputs != len(found.labels):
                cause = f"The graph has {outputs} outputs; the manifest names {len(found.labels)} labels."
                raise EdgePeftError(f"{directory} does not fit together.", cause, "Export again.")
        return cls(found, tokenizer, graphs)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens the model is given for ``prompt``: its text in the model's template, and special tokens.

        Raises:
            UsageError: messages that the template has no place for, no text, or more tokens than the model takes.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = render(self.manifest.template, messages)
        try:
            text.encode()  # tokenizers would call half a surrogate pair "not a string"
        except UnicodeEncodeError as error:
            raise UsageError("The text is not valid Unicode.", str(error), "Save or pass it as UTF-8.") from error
        found = self.tokenizer.encode(text, add_special_tokens=self.manifest.add_special_tokens)
        ids = unclosed(found.ids, found.special_tokens_mask, self.manifest.closing_token_ids or [])
        if not ids:
            raise UsageError("The text is empty.", "It has no tokens.", "Give some text.")
        if len(ids) > self.manifest.max_tokens:
            raise UsageError(
                f"The text has {len(ids)} tokens; the model takes {self.manifest.max_tokens}.",
                "",
                "Shorten the text, or export a model for longer ones.",
            )
        return ids

    def classify(self, text: str) -> list[tuple[str, float]]:
        """Labels and their probabilities, most likely first.

        Raises:
            UsageError: the model is not a classifier, or the text is empty or too long.
        """
        labels = self.manifest.labels
        if labels is None:
            raise UsageError(
                f"{self.manifest.model} generates text ({self.manifest.task}).", "It has no labels.", "Use generate."
            )
        ids = np.array([self.encode(text)], np.int64)
        outputs = self.graphs["model"].run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        logits = outputs["logits"].numpy()[0].astype(np.float64)
        if np.isnan(logits).any():
            cause = "Its weights are damaged, or overflow at this precision."
            raise EdgePeftError("The model's output is not a number.", cause, "Use another precision, or train again.")
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        return [(labels[index], float(probabilities[index])) for index in order]

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generation:
        """The model's answer, piece by piece, until an end token, a stop string, ``max_new_tokens`` or ``max_tokens``.

        Args:
            prompt: a text, or messages.
            max_new_tokens: the most tokens to generate.
            temperature: 0 is greedy.
            top_p: sample only from the most likely tokens that reach this probability together.
            stop: strings that end the answer; they are not part of it.
            seed: makes sampling reproducible.

        Raises:
            UsageError: the model is a classifier, or an argument is outside its range.
        """
        if self.manifest.labels is not None:
            raise UsageError(f"{self.manifest.model} is a classifier.", "It generates no text.", "Use classify.")
        if max_new_tokens < 1:
            raise UsageError(f"The most new tokens is {max_new_tokens}.", "", "Give 1 or more.")
        choose = sampler(temperature, top_p, seed)
        stops = StopStrings([*stop, *(self.manifest.stop or [])])
        ids = np.array([self.encode(prompt)], np.int64)
        if self.manifest.task == "causal-lm":  # the last token generated is not read again, so it needs no position
            max_new_tokens = min(max_new_tokens, self.manifest.max_tokens - ids.shape[1] + 1)
        steps = decode.steps(self.graphs, ids, np.ones_like(ids), self.manifest.decoder_start_token_id)
        eos = self.manifest.eos_token_ids
        tokens = decode.generate(steps, choose, max_new_tokens, eos)
        return Generation(tokens, eos, Detokenizer(self.tokenizer), stops)
