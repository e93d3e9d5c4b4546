"""A tokenizer's chat template, a Jinja program, as the plain data that :mod:`edgepeft.chat` renders."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from edgepeft.chat import render
from edgepeft.errors import EdgePeftError, UsageError

Messages = list[dict[str, str]]

SYSTEM = {"role": "system", "content": "sentinel-system"}
USERS: Messages = [{"role": "user", "content": f"sentinel-user-{i}"} for i in range(2)]
ANSWER = {"role": "assistant", "content": "sentinel-answer"}
DIFFICULT = (
    "  two spaces before, three after   ",
    "\n\nlines\n\n",
    "{{ braces }} <b>&amp;</b> 'quotes'",
    "na\u00efve \u6f22\u5b57 \U0001f642",
)


def extract(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's chat template as data, proven to give the same prompts.

    The template renders conversations of sentinels, whose surroundings are the markers; the result is then compared
    with the template itself on conversations of one to five messages, with and without a system message, with
    difficult text. The markers of an answer are those of an answer in the middle of a conversation, which is how a
    model meets it.

    Raises:
        UsageError: the tokenizer has no chat template.
        EdgePeftError: the template does more than put markers around messages.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "The data holds chats, but the model's tokenizer has no chat template.",
            "It is a base model, or its files are incomplete.",
            "Choose an instruct model, or data with prompt and completion.",
        )
    first, second = USERS
    try:
        template = _from_markers(
            tokenizer, _between(_rendered(tokenizer, [first, ANSWER, second]), [first, ANSWER, second])
        )
    except (jinja2.TemplateError, _Unusual) as error:
        raise _refused(str(error)) from error
    for conversation in _conversations(with_system="system" in template["roles"]):
        expected, found = _rendered(tokenizer, conversation), render(template, conversation)
        if found != expected:
            raise _refused(f"Where it writes {expected[-200:]!r}, its markers alone give {found[-200:]!r}.")
    return template


class _Unusual(Exception):
    """The template is not markers around messages."""


def _from_markers(tokenizer: PreTrainedTokenizerBase, markers: list[str]) -> dict[str, Any]:
    head, user_to_answer, answer_to_user, user_to_prompt = markers
    first, _ = USERS
    before_end = _tails(tokenizer, [first])
    user_after = _one(before_end, user_to_prompt.startswith, "a prompt does not go on where a user message ends")
    prompt = user_to_prompt.removeprefix(user_after)
    answer_before = user_to_answer.removeprefix(user_after)
    if not user_to_answer.startswith(user_after) or not answer_before.startswith(prompt):
        raise _Unusual(f"answers begin with {answer_before!r} but are asked for with {prompt!r}")
    answer_after = _one(
        _tails(tokenizer, [first, ANSWER]), answer_to_user.startswith, "the last answer ends unlike others"
    )
    if not answer_after.strip():  # white space is in answers too: a device would never stop, or stop in their middle
        raise _Unusual("nothing but white space marks the end of an answer; {{ eos_token }} would")
    user_before = answer_to_user.removeprefix(answer_after)
    if not head.endswith(user_before):
        raise _Unusual("the first user message is marked unlike the others")
    head = head.removesuffix(user_before)
    bos = tokenizer.bos_token or ""
    # SmolLM2 names the marker that opens every message its bos token; that is no start of the conversation.
    start = bos if head.startswith(bos) and not user_before.startswith(bos) else ""

    roles = {"user": [user_before, user_after], "assistant": [answer_before, answer_after]}
    try:
        system_head, system_to_user, _ = _between(_rendered(tokenizer, [SYSTEM, first]), [SYSTEM, first])
    except (jinja2.TemplateError, _Unusual):
        pass  # Some templates refuse system messages, others weave them into the user's: no such role then.
    else:
        if system_to_user.endswith(user_before) and system_head.startswith(start):
            roles["system"] = [system_head.removeprefix(start), system_to_user.removesuffix(user_before)]
    padded = {"role": "user", "content": f"  {first['content']}  "}
    return {
        "kind": "chat",
        "start": start,
        "default_system": head.removeprefix(start),
        "roles": roles,
        "generation_prompt": prompt,
        "trim": _rendered(tokenizer, [padded]) == _rendered(tokenizer, [first]),
    }


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = True) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _between(text: str, messages: Messages) -> list[str]:
    """What stands before, between and after the contents of ``messages`` in ``text``."""
    markers = []
    for message in messages:
        if text.count(message["content"]) != 1:
            raise _Unusual(f"{message['content']} is written {text.count(message['content'])} times")
        marker, text = text.split(message["content"])
        markers.append(marker)
    return [*markers, text]


def _tails(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[str]:
    """What stands after the last message when no answer is asked for, and the same without a closing eos token."""
    tail = _between(_rendered(tokenizer, messages, prompt=False), messages)[-1]
    return [tail, tail.removesuffix(tokenizer.eos_token or "")]


def _one(tails: list[str], fits: Any, otherwise: str) -> str:
    for tail in tails:
        if fits(tail):
            return tail
    raise _Unusual(otherwise)


def _conversations(*, with_system: bool) -> list[Messages]:
    """Conversations that end with the user, over every pairing of :data:`DIFFICULT` contents with roles."""
    contents = DIFFICULT * 3
    conversations = []
    for turn in range(len(DIFFICULT)):
        for length in (1, 3, 5):
            chat = [{"role": ("user", "assistant")[i % 2], "content": contents[turn + i]} for i in range(length)]
            conversations.append(chat)
            if with_system:
                conversations.append([{"role": "system", "content": contents[turn + length]}, *chat])
    return conversations


def _refused(cause: str) -> EdgePeftError:
    return EdgePeftError(
        "The model's chat template cannot be carried to the device.",
        f"It does more than put markers around messages: {cause}",
        "Use data with prompt and completion, or set a simpler chat_template in the model's tokenizer_config.json.",
    )
