"""Which tokens a model sees and which it learns, against Hugging Face's tokenizers and losses."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import CHATML, byte_level, unigram, word_piece
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from edgepeft.chat import render
from edgepeft.data import Data, load
from edgepeft.data.encode import fit
from edgepeft.errors import UsageError

MARKED_CHATML = CHATML.replace(
    "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}",
    "{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content ~ '<|im_end|>\\n' }}{% endif %}",
)
"""CHATML with the tags by which Hugging Face marks what an assistant says."""


def loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, examples: list[dict[str, Any]], **options: Any) -> Data:
    """``examples`` both to train and to validate on, so that indices are positions in the list."""
    source = tmp_path / "examples.jsonl"
    source.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    settings = {"max_tokens": 64, **options}
    return load(str(source), validation=str(source), tokenizer=tokenizer, cache=tmp_path / "cache", **settings)


def next_token_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean cross-entropy that the contract's batches ask for. ``logits`` is ``(batch, tokens, vocabulary)``."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch["target_positions"]], batch["target_ids"])


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_tokens_are_those_of_inference(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_level(bos=bos)
    pairs = [
        ("Question: the fox?\nAnswer:", " a dog"),
        ("Answer: ", "the dog"),
        ("na\u00efve \U0001f642", "\U0001f642"),
    ]
    data = loaded(tmp_path, tokenizer, [{"prompt": p, "completion": c} for p, c in pairs])
    assert data.task == "causal-lm" and data.template == {"kind": "plain"}
    for example, (prompt, completion) in zip(data.train.examples(range(3)), pairs, strict=True):
        assert example.prompt_ids == tokenizer(prompt)["input_ids"]
        assert example.prompt_ids[:1] == [tokenizer.bos_token_id] or not bos
        assert tokenizer.decode(example.target_ids) == completion + "<|im_end|>"
        assert (example.fields["prompt"], example.reference) == (prompt, completion)
    assert (data.train.truncated, data.train.dropped) == (0, 0) and "left out" not in data.described(16)


def test_a_closing_token_of_the_tokenizer_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = unigram()
    data = loaded(tmp_path, tokenizer, [{"prompt": "The fox", "completion": "the dog"}])
    [example] = data.train.examples([0])
    assert example.prompt_ids == tokenizer("The fox", add_special_tokens=False)["input_ids"]
    assert example.target_ids == tokenizer("the dog")["input_ids"]


def test_chat_learns_what_the_assistant_says(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["the fox", " a dog", "\n", "Paris?", "\U0001f642", "  ", "<b>"]
    chats = []
    for i in range(40):
        roles = ["system"] * (i % 2) + ["user", "assistant"] * rng.randint(1, 3) + ["user"] * (i % 3 == 0)
        # An answer that begins with white space may share a token with the prompt; that is another test.
        chats.append([{"role": role, "content": "a" + "".join(rng.choices(words, k=4))} for role in roles])
    tokenizer = byte_level(chat_template=CHATML)
    data = loaded(tmp_path, tokenizer, [{"messages": chat} for chat in chats], max_tokens=1000)
    for i, (chat, example) in enumerate(zip(chats, data.train.examples(range(40)), strict=True)):
        expected: Any = tokenizer.apply_chat_template(
            chat, chat_template=MARKED_CHATML, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = [p for p, said in enumerate(expected["assistant_masks"]) if said]
        batch = data.train.collate([i])
        assert (batch["target_positions"] + 1).tolist() == learned
        assert batch["input_ids"][0].tolist() == expected["input_ids"][: learned[-1] + 1]
        last = max(p for p, message in enumerate(chat) if message["role"] == "assistant")
        prompt = render(data.template, chat[:last])
        assert example.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example.reference == chat[last]["content"]


def test_token_across_the_border_of_an_answer_is_not_learned(tmp_path: Path) -> None:
    """With ' ' before answers, ' the' is one token that begins in the prompt: the model is never asked to write it."""
    template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip # noqa: E501
    tokenizer = byte_level(chat_template=template)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the dog"}]
    [example] = loaded(tmp_path, tokenizer, [{"messages": chat}]).train.examples([0])
    assert tokenizer.decode(example.target_ids) == " dog<|im_end|>"


def test_causal_loss_is_that_of_masked_labels(tmp_path: Path) -> None:
    tokenizer = byte_level(bos=True)
    pairs = [("The fox", " jumps over the dog."), ("Which city is it?", " Paris"), ("a", "b")]
    data = loaded(tmp_path, tokenizer, [{"prompt": p, "completion": c} for p, c in pairs])
    batch = data.train.collate([2, 0, 1])
    labels = torch.full_like(batch["input_ids"], -100)
    for row, index in enumerate([2, 0, 1]):
        [example] = data.train.examples([index])
        begin, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.target_ids)
        assert batch["input_ids"][row, :end].tolist() == example.prompt_ids + example.target_ids
        assert batch["attention_mask"][row].tolist() == [1] * end + [0] * (len(labels[row]) - end)
        labels[row, begin:end] = batch["input_ids"][row, begin:end]
    assert data.train.target_lengths.sum() == len(batch["target_ids"]) == int((labels != -100).sum())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.no_grad():
        output = LlamaForCausalLM(config)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        )
    torch.testing.assert_close(next_token_loss(output.logits, batch), output.loss)


def test_seq2seq_loss_is_that_of_t5(tmp_path: Path) -> None:
    tokenizer = unigram()
    pairs = [("The quick brown fox", "jumps over the dog."), ("Which city is it?", "Paris")]
    data = loaded(tmp_path, tokenizer, [{"input": i, "target": t} for i, t in pairs])
    assert data.task == "seq2seq"
    batch = data.train.collate([0, 1])
    expected = tokenizer([i for i, _ in pairs], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    targets = tokenizer([t for _, t in pairs], padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 120, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes | {"decoder_start_token_id": 0})
    with torch.no_grad():
        model = T5ForConditionalGeneration(config).eval()
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}).logits
    torch.testing.assert_close(next_token_loss(logits, batch), output.loss)
    assert data.train.target_lengths.tolist() == targets["attention_mask"].sum(1).tolist()
    assert [e.target_ids for e in data.train.examples([1])] == [tokenizer("Paris")["input_ids"]]


def test_text_alone_is_learned_from_the_second_token(tmp_path: Path) -> None:
    tokenizer = byte_level()
    data = loaded(tmp_path, tokenizer, [{"text": "The quick brown fox"}, {"text": "a"}], task="causal-lm")
    batch = data.train.collate([0])
    ids = [*tokenizer("The quick brown fox")["input_ids"], tokenizer.eos_token_id]
    assert batch["input_ids"][0].tolist() == ids
    assert batch["target_ids"].tolist() == ids[1:]
    assert batch["target_positions"].tolist() == list(range(len(ids) - 1))


def test_classification_is_cut_as_the_tokenizer_cuts(tmp_path: Path) -> None:
    tokenizer = word_piece()
    texts = ["This film is wonderful", "the fox " * 20, "terrible [SEP] film " * 20, "a b c d e f g", "a b c d e f g h"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    data = loaded(tmp_path, tokenizer, rows, max_tokens=9)
    batch = data.train.collate(range(5))
    expected = tokenizer(texts, truncation=True, max_length=9, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0]
    assert data.train.truncated == 3
    assert data.train.lengths.tolist() == expected["attention_mask"].sum(1).tolist()


def test_seq2seq_is_cut_at_both_ends(tmp_path: Path) -> None:
    tokenizer = unigram()
    rows = [{"input": "the fox " * 9, "target": "the dog"}, {"input": "a", "target": "the dog " * 9}]
    data = loaded(tmp_path, tokenizer, rows, max_tokens=8, max_target_tokens=6)
    first, second = data.train.examples([0, 1])
    assert first.prompt_ids == tokenizer("the fox " * 9, truncation=True, max_length=8)["input_ids"]
    assert second.target_ids == tokenizer("the dog " * 9)["input_ids"][:6]
    assert data.train.truncated == 2


def test_long_prompt_loses_its_beginning_and_long_answer_its_end(tmp_path: Path) -> None:
    tokenizer = byte_level(bos=True)
    rows = [{"prompt": "Which city? " * 20, "completion": " Paris"}, {"prompt": "a b", "completion": " dog" * 50}]
    data = loaded(tmp_path, tokenizer, rows, max_tokens=16)
    long_prompt, long_answer = data.train.examples([0, 1])
    answer = tokenizer(" Paris<|im_end|>", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Which city? " * 20)["input_ids"]
    assert long_prompt.target_ids == answer
    assert long_prompt.prompt_ids == [tokenizer.bos_token_id, *prompt[len(answer) - 15 :]]
    assert long_answer.prompt_ids == [tokenizer.bos_token_id, tokenizer("a b")["input_ids"][-1]]
    assert long_answer.target_ids == tokenizer(" dog" * 50, add_special_tokens=False)["input_ids"][:14]
    assert data.train.truncated == 2 and data.train.lengths.tolist() == [16, 16]


def test_fit_keeps_the_last_answer_in_every_small_case() -> None:
    for length, bos, limit in itertools.product(range(1, 8), (False, True), range(3, 8)):
        for answer in itertools.product([False, True], repeat=length):
            ids = list(range(10, 10 + length))
            kept, learned, cut = fit(ids, list(answer), limit, bos_id=10 if bos else None)
            learnable = [p for p in range(1, length) if answer[p]]
            if not learnable:
                assert not any(learned)
                continue
            assert len(kept) == len(learned) <= limit and not learned[0]
            assert kept == sorted(set(kept)) and set(kept) <= set(ids)
            assert all(answer[token - 10] for token, learn in zip(kept, learned, strict=True) if learn)
            assert learned[-1]  # nothing after the last answer
            last = learnable[-1]
            run = [p for p in range(1, last + 1) if all(answer[p : last + 1])]
            room = limit - 1 - int(bos and run[0] > 1)
            assert [token - 10 for token, learn in zip(kept, learned, strict=True) if learn and token - 10 in run] == run[:room]  # fmt: skip # noqa: E501
            assert cut == (last + 1 > limit)
            assert cut or kept == ids[: last + 1]
            assert not bos or kept[0] == 10


def test_example_with_nothing_to_learn_is_dropped_and_counted(tmp_path: Path) -> None:
    """A text of one token that is itself eos has no second token."""
    rows = [{"text": "The fox"}, {"text": "<|im_end|>"}, {"text": "the dog"}]
    data = loaded(tmp_path, byte_level(), rows, task="causal-lm")
    assert (len(data.train), data.train.dropped) == (2, 1)
    assert "; 1 of train and 1 of validation left out, as no token was left to learn" in data.described(16)
    assert [e.reference for e in data.train.examples([0, 1])] == ["The fox", "the dog"]


def test_no_example_left_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No example of the train split has a token left to learn"):
        loaded(tmp_path, byte_level(), [{"text": "<|im_end|>"}] * 3, task="causal-lm")


def test_system_message_without_a_place_is_named_with_line(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML[CHATML.index("{% for") :]  # fmt: skip # noqa: E501
    chat = [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]
    with pytest.raises(UsageError, match=r"examples.jsonl, line 2: A message has the role 'system'"):
        loaded(tmp_path, byte_level(chat_template=refusing), [{"messages": chat[1:]}, {"messages": chat}])
