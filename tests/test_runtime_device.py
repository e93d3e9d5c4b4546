"""A loaded device folder: labels, streamed text, and the limits it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import exported
import numpy as np
import pytest
import torch

from edgepeft.errors import UsageError
from edgepeft.runtime import manifest
from edgepeft.runtime.device import Device


@pytest.fixture(scope="module")
def device() -> Callable[[str], Device]:
    loaded = {task: Device.load(exported.folder(task), threads=1) for task in manifest.GRAPHS}
    return loaded.__getitem__


def test_probabilities_are_those_of_torch(device: Callable[[str], Device]) -> None:
    text = "A film that is good, or bad; who knows? naïve façade"
    inputs = exported.tokenizer("classification")(text, return_tensors="pt")
    with torch.no_grad():
        output = exported.model("classification")(inputs["input_ids"], inputs["attention_mask"])
    expected = dict(zip(exported.LABELS, output.logits[0].softmax(-1).tolist(), strict=True))
    found = device("classification").classify(text)
    assert dict(found) == pytest.approx(expected, abs=1e-5)
    assert [label for label, _ in found] == sorted(expected, key=lambda label: -expected[label])


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq"])
def test_streamed_text_is_the_full_decode_of_transformers_tokens(task: str, device: Callable[[str], Device]) -> None:
    tokenizer = exported.tokenizer(task)
    text = "Grüße aus 東京"
    if task == "causal-lm":
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = np.array([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    else:
        ids = np.array([tokenizer(text)["input_ids"]])
    assert device(task).encode(text) == ids[0].tolist()
    eos = exported.model(task).config.eos_token_id
    expected = exported.greedy_tokens(task, ids, np.ones_like(ids), 24, eos)[0]
    generation = device(task).generate(text, max_new_tokens=24)
    pieces = list(generation)
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(pieces) > 3
    assert generation.tokens == len(expected)


def test_a_prompt_is_one_user_message(device: Callable[[str], Device]) -> None:
    chat = device("causal-lm")
    assert chat.encode("Hi") == chat.encode([{"role": "user", "content": "Hi"}])
    system = chat.encode([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}])
    assert chat.tokenizer.decode(system, skip_special_tokens=False) == (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_sampling_repeats_with_its_seed(device: Callable[[str], Device]) -> None:
    def sample(seed: int | None) -> str:
        return "".join(device("causal-lm").generate("Hi", max_new_tokens=12, temperature=3.0, top_p=0.99, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert sample(None) != sample(None)


def test_a_stop_string_ends_the_text_and_the_work(device: Callable[[str], Device]) -> None:
    full = device("causal-lm").generate("Hi", max_new_tokens=24)
    text = "".join(full)
    stop = text[len(text) // 2 :][:3]
    generation = device("causal-lm").generate("Hi", max_new_tokens=24, stop=["never seen", stop])
    assert "".join(generation) == text[: text.index(stop)]
    assert generation.tokens < full.tokens


def test_an_end_token_that_is_an_ordinary_word_stays_out_of_the_text(device: Callable[[str], Device]) -> None:
    chat = device("causal-lm")
    ids = np.array([chat.encode("Hi")])
    tokens = exported.greedy_tokens("causal-lm", ids, np.ones_like(ids), 12, None)[0].tolist()
    end = next(token for token in tokens[3:] if chat.tokenizer.decode([token]).strip())
    ending = Device(dataclasses.replace(chat.manifest, eos_token_ids=[end]), chat.tokenizer, chat.graphs)
    generation = ending.generate("Hi", max_new_tokens=12)
    assert "".join(generation) == chat.tokenizer.decode(tokens[: tokens.index(end)])
    assert generation.tokens == tokens.index(end) + 1


def test_prompt_and_answer_together_keep_to_max_tokens(device: Callable[[str], Device]) -> None:
    chat = device("causal-lm")
    overhead = len(chat.encode(""))
    prompt = "q" * (exported.MAX_TOKENS - overhead - 4)
    generation = chat.generate(prompt, max_new_tokens=50)
    list(generation)
    # The last token of an answer is not read again, so it may stand one place further.
    assert len(chat.encode(prompt)) + generation.tokens == exported.MAX_TOKENS + 1
    with pytest.raises(UsageError, match=f"{exported.MAX_TOKENS + 1} tokens; the model takes {exported.MAX_TOKENS}"):
        chat.generate("q" * (exported.MAX_TOKENS - overhead + 1))


def test_what_a_model_cannot_do_is_said(device: Callable[[str], Device]) -> None:
    with pytest.raises(UsageError, match=r"tiny-classification is a classifier[^$]*Use classify"):
        device("classification").generate("text")
    with pytest.raises(UsageError, match=r"generates text \(seq2seq\)"):
        device("seq2seq").classify("text")
    with pytest.raises(UsageError, match="has 2 messages"):
        device("seq2seq").generate([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(UsageError, match="not valid Unicode"):
        device("seq2seq").generate("\udcff")
    with pytest.raises(UsageError, match="most new tokens is 0"):
        device("seq2seq").generate("text", max_new_tokens=0)
