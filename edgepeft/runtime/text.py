"""Tokens and text around an answer: where a prompt ends, whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from edgepeft.errors import UsageError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def unclosed(ids: Sequence[int], added: Sequence[int], closing: Collection[int | None]) -> list[int]:
    """A prompt's tokens without those of ``closing`` that the tokenizer put behind it: an answer is to follow.

    Args:
        added: for each token, whether the tokenizer added it to the text (its special tokens mask).
    """
    end = len(ids)
    while end > 1 and added[end - 1] and ids[end - 1] in closing:
        end -= 1
    return list(ids[:end])


class Detokenizer:
    """Turns tokens into text one at a time; the pieces add up to the text of all tokens decoded at once.

    A token can hold part of a character: its text is kept back until the character is whole. Only the tokens of the
    last two pieces are decoded each time. The older ones are context: decoders treat the first token differently (they
    strip the space before a word).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty when a character is still unfinished."""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text still kept back: what a decoder makes of a character that was never finished."""
        text, self._pending = self._pending_text(), []
        return text

    def _pending_text(self) -> str:
        known = self._tokenizer.decode(self._context, skip_special_tokens=True)
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=True)[len(known) :]


class StopStrings:
    """Passes text on until one of the stop strings is complete; neither it nor anything after it comes out.

    The result depends only on the text, not on how it was cut into pieces: the stop string that is complete first
    counts, and of those that end at the same place the longest.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("A stop string is empty.", "It would end every text before it begins.", "Leave it out.")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer belong to a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        longest = max((self._overlap(stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - longest)

    def flush(self) -> str:
        """The text still kept back, when no more will come."""
        return "" if self.stopped else self._release(len(self._held))

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text could be the beginning of ``stop``."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released
