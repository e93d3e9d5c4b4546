"""Streamed text: whole characters that add up, and stop strings however the pieces fall."""

from __future__ import annotations

import json

import exported
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgepeft.errors import UsageError
from edgepeft.runtime.text import Detokenizer, StopStrings

TEXTS = [*dict.fromkeys(exported.CORPUS), "é", "👩‍💻", "東京🚀京東", " a  b ", "x\n\n y"]


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2's: what is not in the vocabulary is spelt in bytes, and the first space is stripped."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        ["the quick brown fox"], trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    # Trained as special tokens to get their places in the vocabulary; as such they would be dropped from the text.
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("kind", ["causal-lm", "classification", "seq2seq", "byte fallback"])
def test_pieces_add_up_to_the_whole_text_in_whole_characters(kind: str) -> None:
    tokenizer = byte_fallback_tokenizer() if kind == "byte fallback" else exported.tokenizer(kind).backend_tokenizer
    kept_back = 0
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token) for token in ids]
        assert detokenizer.flush() == ""
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)
        kept_back += pieces.count("")
    if kind in ("causal-lm", "byte fallback"):
        assert kept_back > 20, "no character was split over tokens, so nothing was shown"


def test_bytes_that_are_no_character_read_as_in_a_full_decode() -> None:
    tokenizer = exported.tokenizer("causal-lm").backend_tokenizer
    random = np.random.default_rng(5)
    for _ in range(200):
        ids = random.integers(0, tokenizer.get_vocab_size(), 12).tolist()
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The plain reading of the rule: the first end of a stop string, and there the longest."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(found, key=len))]
    return text


def test_stop_strings_cut_the_same_however_the_text_arrives() -> None:
    random = np.random.default_rng(6)
    stopped = 0
    for _ in range(3000):
        text = "".join(random.choice(list("ab"), random.integers(0, 12)))
        stops = ["".join(random.choice(list("ab"), random.integers(2, 7))) for _ in range(random.integers(0, 4))]
        cuts = sorted(random.integers(0, len(text) + 1, random.integers(0, 4)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        filtered = StopStrings(stops)
        found = "".join(map(filtered.push, pieces)) + filtered.flush()
        assert found == cut_at_stop(text, stops), (text, stops, pieces)
        assert filtered.stopped == any(stop in text for stop in stops)
        stopped += filtered.stopped
    assert stopped > 300


def test_text_that_cannot_become_a_stop_string_is_not_kept_back() -> None:
    filtered = StopStrings(["\nUser:"])
    assert filtered.push("Hello") == "Hello"
    assert filtered.push(" you\nUs") == " you"
    assert filtered.push("ually") == "\nUsually"
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])
