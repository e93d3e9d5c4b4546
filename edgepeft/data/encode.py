"""Text to tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from edgepeft.chat import turns
from edgepeft.data.columns import Layout
from edgepeft.errors import UsageError
from edgepeft.runtime.text import unclosed

Batch = dict[str, list[Any]]
Tokens = tuple[list[int], list[bool]]
"""The tokens of an example, and which of them belong to an answer."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns a batch of examples into the same batch with tokens, without the examples that have nothing left to learn.

    Classification and seq2seq inputs get the tokenizer's special tokens and are cut at their end, inside those
    tokens. A seq2seq target ends in the eos token, unless it was cut: a model should not learn to stop in mid-sentence.

    Causal examples are the prompt's tokens exactly as inference sees them, then the answer's:

    - prompt + completion are tokenised apart, the prompt with special tokens but no closing eos or sep, and the
      completion closes with eos. Tokenised together, their border could vanish inside one token.
    - a chat is tokenised whole, without special tokens (its template wrote them), and the answers are found by their
      characters. A token that begins before an answer belongs to the prompt.
    - text alone closes with eos and is learned from its second token on.

    :func:`fit` cuts them.
    """

    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    template: Mapping[str, Any]
    labels: tuple[str, ...]
    max_tokens: int
    max_target_tokens: int

    @property
    def features(self) -> datasets.Features:
        """How an encoded example is stored: its fields, its tokens, what is learned, and whether it was ``cut``.

        ``targets`` counts the terms an example adds to the loss.
        """
        ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
        learned: dict[str, dict[str, Any]] = {
            "classification": {"label_id": number},
            "causal-lm": {"answer": datasets.List(datasets.Value("bool"))},
            "seq2seq": {"target_ids": ids},
        }
        tokens = {"input_ids": ids, **learned[self.layout.task], "targets": number, "cut": datasets.Value("bool")}
        return datasets.Features({**self.layout.features, **tokens})

    def __call__(self, batch: Batch) -> Batch:
        if self.layout.task == "classification":
            return self._classification(batch)
        if self.layout.task == "seq2seq":
            return self._seq2seq(batch)
        return self._causal(batch)

    def _classification(self, batch: Batch) -> Batch:
        ids, cut = self._inputs(batch["text"])
        number = {label: i for i, label in enumerate(self.labels)}
        learned = [number[label] for label in batch["label"]]
        return {**batch, "input_ids": ids, "label_id": learned, "targets": [1] * len(ids), "cut": cut}

    def _seq2seq(self, batch: Batch) -> Batch:
        ids, cut = self._inputs(batch["input"])
        whole = [self._closed(target) for target in self._tokenise(batch["target"], special=True)["input_ids"]]
        targets = [target[: self.max_target_tokens] for target in whole]
        cut = [c or len(target) > self.max_target_tokens for c, target in zip(cut, whole, strict=True)]
        return {**batch, "input_ids": ids, "target_ids": targets, "targets": [len(t) for t in targets], "cut": cut}

    def _causal(self, batch: Batch) -> Batch:
        tokenise = {"prompt": self._pairs, "messages": self._chats, "text": self._texts}[self.layout.fields[0]]
        encoded: Batch = {name: [] for name in self.features}
        # In a chat, the template says whether the conversation starts with bos.
        bos_id = self.tokenizer.bos_token_id if self.template.get("start", True) else None
        for i, (ids, answer) in enumerate(tokenise(batch)):
            ids, answer, cut = fit(ids, answer, self.max_tokens, bos_id=bos_id)
            if any(answer):
                row = {name: values[i] for name, values in batch.items()}
                row |= {"input_ids": ids, "answer": answer, "targets": sum(answer), "cut": cut}
                for name, values in encoded.items():
                    values.append(row[name])
        return encoded

    def _pairs(self, batch: Batch) -> Iterator[Tokens]:
        prompts = self._prompts(batch["prompt"])
        completions = self._tokenise(batch["completion"], special=False)["input_ids"]
        for prompt, completion in zip(prompts, completions, strict=True):
            answer = self._closed(completion)
            yield prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _texts(self, batch: Batch) -> Iterator[Tokens]:
        for text in self._prompts(batch["text"]):
            ids = self._closed(text)
            yield ids, [True] * len(ids)

    def _chats(self, batch: Batch) -> Iterator[Tokens]:
        chats = [self._turns(*row) for row in zip(batch["where"], batch["messages"], strict=True)]
        encoding = self._tokenise(["".join(text for text, _ in chat) for chat in chats], special=False, offsets=True)
        for chat, ids, offsets in zip(chats, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            learned = [is_answer for text, is_answer in chat for _ in text]
            yield ids, [start < len(learned) and learned[start] for start, _ in offsets]

    def _turns(self, where: str, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        try:
            return turns(self.template, messages)
        except UsageError as error:
            raise UsageError(f"{where}: {error.fact}", error.cause, error.remedy) from error

    def _prompts(self, texts: list[str]) -> Iterator[list[int]]:
        encoding = self._tokenise(texts, special=True)
        for ids, added in zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True):
            yield unclosed(ids, added, closing(self.tokenizer))

    def _inputs(self, texts: list[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokens with the special tokens around them, at most ``max_tokens``; and which texts lost tokens."""
        encoding = self._tokenise(texts, special=True)
        rows, cut = encoding["input_ids"], [len(ids) > self.max_tokens for ids in encoding["input_ids"]]
        for i in (i for i, long in enumerate(cut) if long):
            ids, added = rows[i], encoding["special_tokens_mask"][i]
            text = [position for position, special in enumerate(added) if not special]
            kept = self.max_tokens - (len(ids) - len(text))
            rows[i] = ids[: text[0] + kept] + ids[text[-1] + 1 :]
        return rows, cut

    def _closed(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _tokenise(self, texts: list[str], *, special: bool, offsets: bool = False) -> Mapping[str, list[list[Any]]]:
        encoding: Mapping[str, list[list[Any]]] = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_special_tokens_mask=True,
            return_offsets_mapping=offsets,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        return encoding


def closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that close a text, which a prompt for an answer does not end in."""
    return [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]


def fit(
    ids: list[int], answer: list[bool], max_tokens: int, *, bos_id: int | None
) -> tuple[list[int], list[bool], bool]:
    """Cut a causal example to ``max_tokens``: its tokens, which of them are learned, and whether any was lost.

    The prompt loses tokens from the left, but for bos, so that the last answer survives; an answer that is too long by
    itself keeps one token before it and is cut at its end. Tokens after the last answer teach nothing and always go.
    The first token is never learned: nothing precedes it that could predict it.
    """
    answer = [False, *answer[1:]]
    if True not in answer:
        return [], [], True
    end = len(answer) - answer[::-1].index(True)
    if end <= max_tokens:
        return ids[:end], answer[:end], False
    first = end - answer[end - 1 :: -1].index(False)
    kept = int(ids[0] == bos_id)
    begin = max(kept, min(end - (max_tokens - kept), first - 1))
    window = slice(begin, min(end, begin + max_tokens - kept))
    return ids[:kept] + ids[window], [False, *(answer[:kept] + answer[window])[1:]], True
