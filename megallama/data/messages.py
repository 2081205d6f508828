"""Messages of a dialogue: what one may hold, in which order they come, and how they are read from a record's field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Names of roles in files -> ours."""

ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
"""What a message's two fields are called; the first that it has counts."""

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>")
"""The chat template's own marks: inside a user's text they would forge turns."""

HUMAN = "\n\nHuman:"
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Message(NamedTuple):
    """One message; `train` False on an assistant's (`"weight": 0` in files) takes its loss away."""

    role: str
    content: str
    train: bool = True


def check_message(message: Message, field: str) -> Message:
    """The message itself, where its content is fit for the chat template.

    Raises:
        ValueError: no text, only blanks, not encodable, or a tag of the template outside an answer.
    """
    content = message.content
    if not isinstance(content, str):
        raise ValueError(f"field '{field}' holds {type(content).__name__}, not text")
    if message.role != "system" and not content.strip():
        what = "answer" if message.role == "assistant" else "user message"
        raise ValueError(f"field '{field}': empty {what}; remove the record or fill it in")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field '{field}' holds half a surrogate pair, which is no character") from None
    if message.role != "assistant" and (tag := next((tag for tag in TAGS if tag in content), None)):
        raise ValueError(f"field '{field}' holds the chat template's tag {tag}; remove or rewrite it")
    return message


def check_turns(messages: Sequence[Message], end: str, field: str) -> None:
    """Whether user and assistant take turns, the user first, behind at most one system message.

    Raises:
        ValueError: they do not, or the last message is not of the role `end`.
    """
    start = int(bool(messages) and messages[0].role == "system")
    for n, message in enumerate(messages[start:]):
        due = ("user", "assistant")[n % 2]
        if message.role != due:
            raise ValueError(
                f"field '{field}': message {n + start + 1} has role {message.role} where {due} is due; user and "
                "assistant take turns, the user first, one system message may come before them"
            )
    last = messages[-1].role if messages else "nothing"
    if last != end:
        raise ValueError(f"field '{field}' ends with {last}, but the last message must be of role {end}")


def read_messages(value: Any, field: str, role: str) -> list[Message]:
    """The messages in a record's field: a list of them, a transcript (Human: … Assistant: …), or the text of one.

    Empty system messages are left out.

    Args:
        field: its name, for messages.
        role: of a bare text. "user" (the field is a prompt) also lets a transcript end where the answer is due.

    Raises:
        ValueError: as check_message; an unknown role, or a wrong type.
    """
    if isinstance(value, list):
        found = [_message(item, f"{field}[{n}]") for n, item in enumerate(value)]
        return [message for message in found if message.role != "system" or message.content.strip()]
    if not isinstance(value, str):
        raise ValueError(f"field '{field}' holds {type(value).__name__}, neither text nor a list of messages")
    if not value.startswith(HUMAN):
        return [check_message(Message(role, value), field)]
    _, *parts = TURN.split(value)
    found = [Message(SPEAKERS[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    if role == "user" and found[-1] == Message("assistant", ""):
        found.pop()
    return [check_message(message, field) for message in found]


def _message(item: Any, field: str) -> Message:
    """One entry of a list of messages."""
    if not isinstance(item, dict):
        raise ValueError(f"field '{field}' holds {type(item).__name__}, not a message with role and content")
    role_field, content_field = (
        next((name for name in names if item.get(name) is not None), None) for names in (ROLE_FIELDS, CONTENT_FIELDS)
    )
    for name, names in ((role_field, ROLE_FIELDS), (content_field, CONTENT_FIELDS)):
        if name is None:
            raise ValueError(f"field '{field}' has no {' or '.join(names)}; found {', '.join(map(repr, item))}")
    role, weight = item[role_field], item.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"field '{field}.{role_field}': unknown role {role!r}; known are {', '.join(ROLES)}")
    if weight not in (None, 0, 1):
        raise ValueError(f"field '{field}.weight' is {weight!r}; an answer's weight is 0 (no loss) or 1")
    return check_message(Message(ROLES[role], item[content_field], weight != 0), f"{field}.{content_field}")
