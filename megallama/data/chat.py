"""Llama 2's chat template in token ids, around each user's message and its answer:

    BOS [INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} EOS

the system part in the first of them only, and only if there is a system message.

Prompt and answer are encoded apart, so the ids of a dialogue always begin with those of its prompt; an answer's ids are
those that it has behind the template's closing tag, so that together they are what the tokenizer makes of the whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .messages import Message, check_message, check_turns
from .tokenizer import Tokenizer

PROMPT = "[INST] {} [/INST]"
SYSTEM = "<<SYS>>\n{}\n<</SYS>>\n\n"
ANCHOR = "[/INST]"
"""What stands before every answer, a blank between them."""


class Encoded(NamedTuple):
    """A dialogue in ids.

    Attributes:
        ids: int32 (n,); there are many of them in memory.
        train: bool (n,), the token carries loss: it belongs to an answer that is trained, or is the EOS behind it.
    """

    ids: np.ndarray
    train: np.ndarray


class Turn(NamedTuple):
    """What the template makes of a user's message, and the answer to it ("" where it is still due)."""

    prompt: str
    answer: str
    train: bool


class ChatFormat:
    """Dialogues to ids and generated ids to answers. Blanks around system, user and answer texts do not count.

    Args:
        tokenizer: BOS is left out where it has none.
        separator: piece between prompt and answer; None = nothing but the template's blank.

    Raises:
        ValueError: the tokenizer has no EOS, or the separator is no single piece of it.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str | None = None):
        if tokenizer.eos is None:
            raise ValueError("the tokenizer has no EOS token, but every answer ends with it; choose another tokenizer")
        self._separator: list[int] = []
        if separator is not None:
            token = tokenizer.token_id(separator)
            if token is None:
                raise ValueError(
                    f"the separator {separator!r} is no single token among the tokenizer's {tokenizer.vocab_size}; "
                    "name one that is, or none"
                )
            self._separator = [token]
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos
        self._bos = [] if tokenizer.bos is None else [tokenizer.bos]
        self._anchor = tokenizer.encode(ANCHOR)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of messages that end with a user's, up to where the answer begins (the separator included).

        Raises:
            ValueError: messages that make no prompt, or that spell a special token.
        """
        _check(messages, "user")
        *before, last = _turns(messages)
        earlier = [token for ids, answer in self._pairs(before) for token in (*ids, *answer, self.eos)]
        return earlier + self._prompts([last.prompt])[0]

    def dialogue(self, messages: Sequence[Message]) -> Encoded:
        """Messages that end with an assistant's; the ids begin with prompt(messages[:-1]).

        Raises:
            ValueError: messages that make no dialogue, no answer that carries loss, or a special token spelt in them.
        """
        return self.dialogues([messages])[0]

    def dialogues(self, batch: Sequence[Sequence[Message]]) -> list[Encoded]:
        """dialogue() of many, encoded together."""
        for messages in batch:
            _check(messages, "assistant")
        split = [_turns(messages) for messages in batch]
        pairs = iter(self._pairs([turn for turns in split for turn in turns]))
        encoded = []
        for turns in split:
            ids: list[int] = []
            train: list[bool] = []
            for turn, (prompt, answer) in zip(turns, pairs, strict=False):
                ids += [*prompt, *answer, self.eos]
                train += [False] * len(prompt) + [turn.train] * (len(answer) + 1)
            if not any(train):
                raise ValueError(f"no answer among {len(turns)} carries loss (train is False on all of them)")
            encoded.append(Encoded(np.array(ids, np.int32), np.array(train)))
        return encoded

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as dialogue() places them, without EOS; none for blanks."""
        return self._answers([text])[0] if text.strip() else []

    def text(self, ids: ArrayLike) -> str:
        """The answer in generated ids (n,): up to EOS, without BOS and outer blanks."""
        kept: list[int] = np.asarray(ids, np.int64).tolist()
        if self.eos in kept:
            kept = kept[: kept.index(self.eos)]
        return self.tokenizer.decode([token for token in kept if token not in self._bos]).strip()

    def fingerprint(self) -> str:
        """SHA-256 (hex): equal fingerprints encode dialogues equally."""
        parts = [PROMPT, SYSTEM, ANCHOR, self._separator, self.tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _pairs(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of each turn."""
        answers = self._answers([turn.answer for turn in turns])
        return list(zip(self._prompts([turn.prompt for turn in turns]), answers, strict=True))

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self._bos, *ids, *self._separator] for ids in self._encode(texts)]

    def _answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers as they are behind the anchor. Where that would not begin with the anchor's own ids (a
        tokenizer whose pieces reach over blanks), those of the answer alone."""
        texts = [text.strip() for text in texts]
        anchor = self._anchor
        coded = self._encode([f"{ANCHOR} {text}" for text in texts])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._encode([text])[0]
            for ids, text in zip(coded, texts, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one that comes again (a prompt with several answers) is encoded once."""
        distinct = list(dict.fromkeys(texts))
        coded = dict(zip(distinct, self.tokenizer.encode_batch(distinct), strict=True))
        reserved = {self.eos, *self._bos}
        for text, ids in coded.items():
            if not reserved.isdisjoint(ids):
                token = next(token for token in ids if token in reserved)
                raise ValueError(
                    f"a text spells the tokenizer's special token {self.tokenizer.decode([token])!r} ({token}), which "
                    f"only the chat template may place: {text[:80]!r}"
                )
        return [coded[text] for text in texts]


def _check(messages: Sequence[Message], end: str) -> None:
    """Whether the messages fit the template; the last one has role `end`."""
    for n, message in enumerate(messages):
        check_message(message, f"messages[{n}].content")
    check_turns(messages, end, "messages")


def _turns(messages: Sequence[Message]) -> list[Turn]:
    system, turns = "", []
    if messages[0].role == "system":
        system, messages = messages[0].content.strip(), messages[1:]
    head = SYSTEM.format(system) if system else ""
    for n in range(0, len(messages), 2):
        prompt = PROMPT.format(head + messages[n].content.strip())
        answer = messages[n + 1] if n + 1 < len(messages) else Message("assistant", "")
        turns.append(Turn(prompt, answer.content, answer.train))
        head = ""
    return turns
