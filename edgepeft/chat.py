"""Conversations as text, by a template that is plain data: training and the device render the very same characters.

A template is JSON. ``{"kind": "plain"}`` leaves text as it is. A chat template is ``{"kind": "chat", "start": str,
"default_system": str, "roles": {role: [before, after]}, "generation_prompt": str, "trim": bool}``: ``default_system``
is the whole rendered turn that stands in when the first message is not a system message, and ``trim`` says that the
outer white space of a message is dropped. A role that the model's own template refuses is absent from ``roles``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepeft.errors import UsageError

PLAIN: Mapping[str, Any] = {"kind": "plain"}
_OF_CHATS = {"start": str, "default_system": str, "roles": dict, "generation_prompt": str, "trim": bool}


def is_whole(template: Mapping[str, Any]) -> bool:
    """Whether data that was read from a file is a template, with all that ``render`` looks for in one."""
    if template.get("kind") == "plain":
        return True
    if template.get("kind") != "chat" or not all(isinstance(template.get(key), of) for key, of in _OF_CHATS.items()):
        return False
    marks = template["roles"].values()
    return all(isinstance(pair, list) and [type(each) for each in pair] == [str, str] for pair in marks)


def render(template: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt for the next answer: every message in its markers, then the generation prompt.

    The text of a chat already holds the special tokens, so it is tokenised with ``add_special_tokens=False``; plain
    text with ``True``.

    Raises:
        UsageError: the template has no place for one of the roles, or is plain and there is more than one message.
    """
    if template["kind"] == "plain":
        if len(messages) != 1:
            raise UsageError(
                f"The conversation has {len(messages)} messages.",
                "The model was trained on plain prompts, not on chats.",
                "Send one message.",
            )
        return messages[0]["content"]
    return "".join(text for text, _ in turns(template, messages)) + str(template["generation_prompt"])


def turns(template: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
    """A conversation cut into pieces ``(text, is_answer)``. Joined they are its text, without a generation prompt at
    the end.

    An answer is what the model has to write after the generation prompt: the content of an assistant message and the
    marker that ends it, without the line break that follows the marker.

    Raises:
        UsageError: the template has no place for one of the roles.
    """
    pieces = [(str(template["start"]), False)]
    if not messages or messages[0]["role"] != "system":
        pieces.append((str(template["default_system"]), False))
    for message in messages:
        role = message["role"]
        if role not in template["roles"]:
            raise UsageError(
                f"A message has the role {role!r}.",
                f"The model's chat template knows {', '.join(sorted(template['roles']))}.",
                "Leave such messages out, or put their text into the first user message.",
            )
        before, after = template["roles"][role]
        content = message["content"].strip() if template["trim"] else message["content"]
        if role == "assistant":
            prompt, end = template["generation_prompt"], end_of_turn(template)
            pieces.append((prompt, False))
            pieces.append((before[len(prompt) :] + content + end, True))
            pieces.append((after[len(end) :], False))
        else:
            pieces.append((before + content + after, False))
    return pieces


def end_of_turn(template: Mapping[str, Any]) -> str:
    """The text that closes an answer in a chat template, e.g. ``<|im_end|>``."""
    return str(template["roles"]["assistant"][1]).rstrip()
