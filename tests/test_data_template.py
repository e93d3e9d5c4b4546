"""Chat templates as data must write what the Jinja templates write."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from tiny_tokenizers import CHATML, byte_level

from edgepeft.chat import end_of_turn, render, turns
from edgepeft.data.template import extract
from edgepeft.errors import EdgePeftError, UsageError

# The families of the catalogue, each in the fewest words that keep what is peculiar to it.
LLAMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set sys = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}"
    "{{ '<|h|>system<|/h|>\\n\\nToday Date: 26 Jul 2024\\n\\n' ~ sys ~ '<|im_end|>' }}"
    "{% for m in messages %}{{ '<|h|>' ~ m.role ~ '<|/h|>\\n\\n' ~ (m.content | trim) ~ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ (m.content | trim) ~ '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content ~ '\\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ (sys if loop.last else '') ~ m.content ~ '[/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILIES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "phi": PHI, "qwen3": QWEN3}
WITH_SYSTEM = {"chatml", "llama", "phi", "qwen3"}


def random_chat(rng: random.Random, *, system: bool) -> list[dict[str, str]]:
    """A conversation that ends with the user, of one to seven turns of random text with odd white space in it."""
    contents = ("".join(rng.choices(" \nab{}%<|>\u00e9\u6f22", k=rng.randint(0, 12))) + "x" for _ in itertools.count())
    chat = [{"role": "system", "content": next(contents)}] if system else []
    roles = itertools.cycle(["user", "assistant"])
    return chat + [{"role": next(roles), "content": next(contents)} for _ in range(rng.choice([1, 3, 5, 7]))]


@pytest.mark.parametrize("family", FAMILIES)
def test_extracted_template_renders_as_the_tokenizer_does(family: str) -> None:
    tokenizer = byte_level(bos=True, chat_template=FAMILIES[family])
    template = json.loads(json.dumps(extract(tokenizer)))
    assert ("system" in template["roles"]) == (family in WITH_SYSTEM)
    rng = random.Random(family)
    for trial in range(60):
        chat = random_chat(rng, system=family in WITH_SYSTEM and trial % 2 == 0)
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert render(template, chat) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_the_prompt_and_the_answer(family: str) -> None:
    """Every answer follows exactly the text that asks for it, and ends with the end-of-turn marker."""
    template = extract(byte_level(bos=True, chat_template=FAMILIES[family]))
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    pieces = turns(template, chat)
    answers = [i for i, (_, is_answer) in enumerate(pieces) if is_answer]
    assert len(answers) == 2
    for i, messages in zip(answers, (chat[:1], chat[:3]), strict=True):
        assert "".join(text for text, _ in pieces[:i]) == render(template, messages)
        content = chat[len(messages)]["content"]
        assert pieces[i][0].strip().removesuffix(end_of_turn(template)).strip() == content
        assert pieces[i][0].endswith(end_of_turn(template)) and end_of_turn(template).strip()


def test_chatml_template_is_what_one_would_write_by_hand() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    tokenizer.bos_token = "<|im_start|>"  # as in SmolLM2, though no text begins with it of its own
    template = extract(tokenizer)
    assert template["start"] == ""
    assert template["default_system"] == "<|im_start|>system\nYou are a small helper.<|im_end|>\n"
    assert template["roles"]["assistant"] == ["<|im_start|>assistant\n", "<|im_end|>\n"]
    assert template["generation_prompt"] == "<|im_start|>assistant\n"
    assert end_of_turn(template) == "<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role ~ m.content | upper ~ '\\n' }}{% endfor %}",
        "{% for m in messages %}{{ loop.index ~ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}",
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | replace('<', '&lt;') ~ '\\n' }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}{% if add_generation_prompt %}say{% endif %}",
        "{% for m in messages %}{{ '# ' ~ m.role ~ '\\n' ~ m.content ~ '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '# assistant\\n' }}{% endif %}",
    ],
)
def test_template_that_does_more_is_refused(template: str) -> None:
    with pytest.raises(EdgePeftError, match="cannot be carried to the device"):
        extract(byte_level(chat_template=template))


def test_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        extract(byte_level())


def test_role_without_a_place_is_refused() -> None:
    template = extract(byte_level(bos=True, chat_template=GEMMA))
    with pytest.raises(UsageError, match="role 'system'") as refusal:
        render(template, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "assistant, user" in refusal.value.cause


def test_plain_template_leaves_text_as_it_is() -> None:
    plain: dict[str, Any] = {"kind": "plain"}
    assert render(plain, [{"role": "user", "content": "  as is\n"}]) == "  as is\n"
    with pytest.raises(UsageError, match="2 messages"):
        render(plain, [{"role": "user", "content": "a"}] * 2)
