"""Dialogues to imitate, pairs of answers to compare, prompts to answer: read from files of any common shape.

What shape a record has is told by its fields (FORMS, chosen and rejected, `oasst.FIELDS`). Every reader raises
ValueError with file, line and field where a record is bad; nothing is skipped silently.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import oasst
from .messages import HUMAN, Message, check_message, check_turns, read_messages
from .record_files import Origin, convert, read_rows

T = TypeVar("T")

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
"""How much better the chosen answer is, strongest first; the numbers 3, 2, 1, 0 in files mean the same."""

SHORTEST_ECHO = 16
"""Where answers as text begin with their prompt, it is cut off only if it has so many characters or a line break
follows: two answers that begin with "Hi" prove nothing."""


class Dialogue(NamedTuple):
    """Messages that end with an assistant's; `source` as in the record, else the file's name without its suffixes."""

    messages: tuple[Message, ...]
    source: str
    origin: Origin


class Pair(NamedTuple):
    """Two answers to one prompt, of which `chosen` is better; None where the record does not say."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rating: str | None
    margin: float | None
    chosen_is_safe: bool | None
    rejected_is_safe: bool | None
    source: str
    origin: Origin


class Prompt(NamedTuple):
    """Messages that end with a user's.

    `key` names the prompt among all of its file: the record's id, or a hash of the messages; one that comes again gets
    "#2", "#3" …, so equal prompts stay apart. `record` is the whole record, without fields that are null.
    """

    messages: tuple[Message, ...]
    is_safety: bool
    key: str
    record: dict[str, Any]
    origin: Origin


class Form(NamedTuple):
    """A shape of records that hold a dialogue: prompt fields that are there are joined by a blank line, the first must
    be there; `answer` None = the first field holds the whole dialogue."""

    name: str
    system: str | None
    prompt: tuple[str, ...]
    answer: str | None


FORMS = (
    Form("chat", None, ("messages",), None),
    Form("ShareGPT", None, ("conversations",), None),
    Form("prompt-completion", None, ("prompt",), "completion"),
    Form("prompt-response", None, ("prompt",), "response"),
    Form("Alpaca", None, ("instruction", "input"), "output"),
    Form("Orca", "system_prompt", ("question",), "response"),
)
"""Tried in this order."""

SIDES = ("chosen", "rejected")
PREFERENCE = f"preference ({', '.join(SIDES)})"


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """The dialogues of a file, in its order.

    Raises:
        ValueError: the file cannot be read, holds no dialogue, or holds a bad one.
    """
    rows = read_rows(path)
    if oasst.is_oasst(rows[0][1]):
        found = [
            Dialogue(tuple(m), _source(last.record, last.origin), last.origin) for m, last in oasst.dialogues(rows)
        ]
    else:
        found = convert(rows, _dialogue)
    return _some(found, path, "dialogue")


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file, in its order.

    Raises:
        ValueError: the file cannot be read, holds no pair, or holds a bad one.
    """
    rows = read_rows(path)
    if not oasst.is_oasst(rows[0][1]):
        return convert(rows, _pair)
    siblings = [(better.origin, (prompt, better, worse)) for prompt, better, worse in oasst.pairs(rows)]
    return _some(convert(siblings, _ranked_pair), path, "pair of ranked answers")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order; of dialogues and pairs, what comes before the (last) answer.

    Raises:
        ValueError: the file cannot be read, holds no prompt, or holds a bad one.
    """
    rows = read_rows(path)
    if oasst.is_oasst(rows[0][1]):
        threads = [(node.origin, (messages, node.record)) for messages, node in oasst.prompts(rows)]
        found = convert(threads, lambda item, origin: _as_prompt(item[0], item[1], "message_id", origin))
    else:
        found = convert(rows, lambda record, at: _as_prompt(_prompt_messages(record), record, "id", at))
    return _distinct(_some(found, path, "prompt"))


def _some(found: list[T], path: str | Path, what: str) -> list[T]:
    if not found:
        raise ValueError(f"{path}: holds no {what}")
    return found


def _source(record: dict[str, Any], origin: Origin) -> str:
    source = record.get("source", Path(origin.file).name.split(".")[0])
    if not isinstance(source, str):
        raise ValueError(f"field 'source' holds {type(source).__name__}, not text")
    return source


def _unknown(record: dict[str, Any], forms: Sequence[Form], *more: str) -> ValueError:
    shapes = [f"{f.name} ({', '.join((f.prompt[0], *([f.answer] if f.answer else [])))})" for f in forms]
    known = "; ".join((*shapes, *more, f"OASST ({', '.join(oasst.FIELDS)})"))
    return ValueError(f"unknown shape: the record has {', '.join(map(repr, record)) or 'no field'}; known are {known}")


def _prompt_part(record: dict[str, Any], form: Form) -> list[Message]:
    """The messages in a record's system and prompt fields."""
    messages = []
    if form.system is not None and form.system in record:
        system = check_message(Message("system", record[form.system]), form.system)
        messages = [system] * bool(system.content.strip())
    first, *others = form.prompt
    more = [field for field in others if not _is_blank(record.get(field, ""))]
    if not more:
        return messages + read_messages(record[first], first, "user")
    parts = [check_message(Message("user", record[field]), field).content for field in (first, *more)]
    return [*messages, Message("user", "\n\n".join(parts))]


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _dialogue(record: dict[str, Any], origin: Origin) -> Dialogue:
    form = next((f for f in FORMS if f.prompt[0] in record and (f.answer is None or f.answer in record)), None)
    if form is None:
        raise _unknown(record, FORMS)
    messages = _prompt_part(record, form)
    if form.answer is not None:
        check_turns(messages, "user", form.prompt[0])
        messages += read_messages(record[form.answer], form.answer, "assistant")
    field = form.answer or form.prompt[0]
    check_turns(messages, "assistant", field)
    if not any(message.train for message in messages if message.role == "assistant"):
        raise ValueError(f"field '{field}': every answer has weight 0, so that none is left to train")
    return Dialogue(tuple(messages), _source(record, origin), origin)


def _prompt_messages(record: dict[str, Any]) -> list[Message]:
    if "chosen" in record and "rejected" in record:
        return _split(record)[0]
    form = next((f for f in FORMS if f.prompt[0] in record), None)
    if form is None:
        raise _unknown(record, [f._replace(answer=None) for f in FORMS], PREFERENCE)
    messages = _prompt_part(record, form)
    if messages and messages[-1].role == "assistant":
        messages.pop()
    check_turns(messages, "user", form.prompt[0])
    return messages


def _as_prompt(messages: list[Message], record: dict[str, Any], id_field: str, origin: Origin) -> Prompt:
    key = record.get(id_field)
    if key is None:
        text = json.dumps([(m.role, m.content) for m in messages])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ValueError(f"field '{id_field}' holds {type(key).__name__}, neither text nor an integer")
    return Prompt(tuple(messages), bool(_flag(record, "is_safety")), str(key), record, origin)


def _distinct(prompts: list[Prompt]) -> list[Prompt]:
    """The same prompts, with "#2", "#3" … behind keys that came before."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    distinct = []
    for prompt in prompts:
        key = prompt.key
        while key in taken:
            counts[prompt.key] += 1
            key = f"{prompt.key}#{counts[prompt.key] + 1}"
        taken.add(key)
        distinct.append(prompt._replace(key=key))
    return distinct


def _split(record: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected) of a preference record, whose answers may each include the prompt.

    Raises:
        ValueError: a field is bad, there is no prompt, or the two answers are given to different ones.
    """
    prompt, answers = record.get("prompt", []), [record[side] for side in SIDES]
    if isinstance(prompt, str) and not prompt.startswith(HUMAN) and all(isinstance(a, str) for a in answers):
        marks = (prompt,) if len(prompt) >= SHORTEST_ECHO else (prompt + "\n", prompt + "\r\n")
        if all(answer.startswith(marks) for answer in answers):
            answers = [answer[len(prompt) :].strip() for answer in answers]
    asked = read_messages(prompt, "prompt", "user")
    if asked:
        check_turns(asked, "user", "prompt")
    whole = []
    for side, answer in zip(SIDES, answers, strict=True):
        said = read_messages(answer, side, "assistant")
        if not asked and len(said) < 2:
            raise ValueError(f"field 'prompt' is missing, and '{side}' does not include it")
        whole.append(_joined(asked, said, side))
        check_turns(whole[-1], "assistant", side)
    (*before, chosen), (*other, rejected) = whole
    if _words(before) != _words(other):
        raise ValueError("fields 'chosen' and 'rejected' differ before their last message; both must answer one prompt")
    return before, chosen.content, rejected.content


def _joined(asked: list[Message], said: list[Message], field: str) -> list[Message]:
    """The prompt and what a side says, which may begin with that prompt again; either may hold the system message."""
    if not asked or len(said) == 1:
        return asked + said
    system = [m for m in (*asked, *said) if m.role == "system"]
    asked, said = ([m for m in messages if m.role != "system"] for messages in (asked, said))
    if _words(said[: len(asked)]) != _words(asked) or len(set(_words(system))) > 1:
        raise ValueError(f"field '{field}' has several messages, but does not begin with those of field 'prompt'")
    return system[:1] + said


def _words(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]


def _pair(record: dict[str, Any], origin: Origin) -> Pair:
    if not all(side in record for side in SIDES):
        raise _unknown(record, (), PREFERENCE)
    prompt, chosen, rejected = _split(record)
    safe, other_safe = (_flag(record, f"{side}_is_safe") for side in SIDES)
    if safe is False and other_safe is True:
        raise ValueError(
            "field 'chosen_is_safe' is false while 'rejected_is_safe' is true; remove the pair, it must not be trained"
        )
    source = _source(record, origin)
    return _unlike(
        Pair(tuple(prompt), chosen, rejected, _rating(record), _margin(record), safe, other_safe, source, origin)
    )


def _ranked_pair(item: tuple[list[Message], oasst.Node, oasst.Node], origin: Origin) -> Pair:
    prompt, better, worse = item
    answers = better.message.content, worse.message.content
    return _unlike(Pair(tuple(prompt), *answers, None, None, None, None, _source(better.record, origin), origin))


def _unlike(pair: Pair) -> Pair:
    if pair.chosen.strip() == pair.rejected.strip():
        raise ValueError("fields 'chosen' and 'rejected' are equal; remove the record")
    return pair


def _flag(record: dict[str, Any], field: str) -> bool | None:
    value = record.get(field)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"field '{field}' is {value!r}, neither true nor false")
    return value


def _margin(record: dict[str, Any]) -> float | None:
    value = record.get("margin")
    if value is None:
        return None
    # The comparison is false for NaN too, and holds for no integer that float() cannot take.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"field 'margin' is {value!r}, not a finite number")
    return float(value)


def _rating(record: dict[str, Any]) -> str | None:
    value = record.get("rating")
    if value is None or (isinstance(value, str) and value in RATINGS):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(len(RATINGS)):
        raise ValueError(f"field 'rating' is {value!r}; known are {', '.join(RATINGS)}, or 3 to 0")
    return RATINGS[-1 - int(value)]
