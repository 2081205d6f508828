"""The constraints of ghost attention (the paper, section 3.3): hobbies, languages and public figures, which the model
itself lists, combined at random into an instruction that a whole dialogue has to obey."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megallama.data import Message, key
from megallama.data.messages import TAGS
from megallama.inference.sampling import Sampling
from megallama.rlhf.chat_model import ChatModel

GHOST_KEY = 5
"""Sets the draws of this stage apart from other keys of a seed."""
DRAW_KINDS, DRAW_ENTRY, DRAW_SHORT, DRAW_ANSWER, DRAW_LIST = range(5)
LONGEST_ENTRY = 60
"""Characters: what is longer is a sentence, not the name of something."""


class Kind(NamedTuple):
    """A kind of constraint: how an instruction says it, in full and shortened, and how a model is asked for a list."""

    full: str
    short: str
    plural: str


KINDS = {
    "hobby": Kind("You enjoy {}, which shows in every answer.", "Hobby: {}.", "hobbies"),
    "language": Kind("Always answer in {}.", "Language: {}.", "languages that you can write in"),
    "figure": Kind("Always act as {} from now on.", "Figure: {}.", "famous public figures"),
}

Lists = Mapping[str, Sequence[str]]
"""Kind -> what may be chosen."""


class Instruction(NamedTuple):
    """Constraints by kind, in the order of KINDS."""

    constraints: tuple[tuple[str, str], ...]

    def full(self) -> str:
        return " ".join(KINDS[kind].full.format(value) for kind, value in self.constraints)

    def short(self) -> str:
        return " ".join(KINDS[kind].short.format(value) for kind, value in self.constraints)


def draw(lists: Lists, seed: int, record: int) -> Instruction:
    """The instruction of a record: every combination of kinds is equally likely, and so is every entry of a kind."""
    kinds = [kind for kind in KINDS if lists.get(kind)]
    chosen = 1 + _number(2 ** len(kinds) - 1, seed, DRAW_KINDS, record)
    return Instruction(
        tuple(
            (kind, lists[kind][_number(len(lists[kind]), seed, DRAW_ENTRY, record, n)])
            for n, kind in enumerate(kinds)
            if chosen >> n & 1
        )
    )


def is_short(seed: int, record: int) -> bool:
    """Whether a record shows its instruction shortened: of records 2k and 2k + 1 one does, so half of them do."""
    return bool(_number(2, seed, DRAW_SHORT, record // 2) ^ record & 1)


def answer_seed(seed: int, record: int, turn: int) -> int:
    """The seed of a record's answer in a turn."""
    return int(key(seed, GHOST_KEY, DRAW_ANSWER, record, turn)) >> 1


def _number(below: int, seed: int, *words: int) -> int:
    return int(key(seed, GHOST_KEY, *words) % np.uint64(below))


BULLET = re.compile(r"\s*(?:\d+\s*[.):]|[-*•–])\s+(.+)")
BEHIND = re.compile(r"\s+[-–—]\s|[:(;,\n]")
"""Where an entry goes over into what is said about it."""


def listed(text: str, finished: bool = True) -> list[str]:
    """The entries of a numbered or bulleted list in a model's answer, without what is said about them.

    Args:
        finished: the answer is complete; else its last line is not believed.
    """
    lines = text.splitlines()
    items = [found[1] for line in (lines if finished else lines[:-1]) if (found := BULLET.fullmatch(line))]
    return distinct(BEHIND.split(item.replace("*", "").replace("`", ""))[0].strip(" .!\"'“”") for item in items)


def distinct(entries: Iterable[str]) -> list[str]:
    """The usable entries, each once however it is capitalised."""
    found: dict[str, str] = {}
    for entry in entries:
        if 0 < len(entry) <= LONGEST_ENTRY and "\ufffd" not in entry and not any(tag in entry for tag in TAGS):
            found.setdefault(entry.casefold(), entry)
    return list(found.values())


def ask(model: ChatModel, kind: str, count: int, times: int, sampling: Sampling, seed: int) -> list[str]:
    """Ask a model for a list of `count` entries, `times` times over, and join what it says. Collective.

    Raises:
        ValueError: no answer holds a list; shows the beginning of one.
    """
    prompt = model.form.prompt([Message("user", f"List {count} {KINDS[kind].plural}, one a line, numbered.")])
    if len(prompt) + sampling.max_new_tokens > model.longest:
        raise ValueError(
            f"a list of up to {sampling.max_new_tokens} tokens behind a prompt of {len(prompt)} goes beyond the "
            f"{model.longest} of {model.folder}; lower --max-new-tokens"
        )
    number = list(KINDS).index(kind)
    seeds = [int(key(seed, GHOST_KEY, DRAW_LIST, number, n)) >> 1 for n in range(times)]
    said = model.answer([prompt] * times, sampling, seeds)
    found = distinct(entry for text, finished in said for entry in listed(text, finished))
    if not found:
        raise ValueError(
            f"{model.folder} was asked for {KINDS[kind].plural} and gave no numbered or bulleted list but "
            f"{said[0].text[:60]!r}; ask another model, or write the file yourself, an entry a line"
        )
    return found[:count]


def read_list(path: Path) -> list[str]:
    """The entries of a text file, one a line.

    Raises:
        ValueError: it cannot be read, or holds no usable entry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; it should hold an entry a line") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not (found := distinct(line.strip() for line in lines)):
        raise ValueError(f"{path}: no entry of at most {LONGEST_ENTRY} characters in it; write one a line")
    return found
