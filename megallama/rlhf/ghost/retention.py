"""How long a model obeys an instruction of the first turn: the share of answers that still show it, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megallama.data import key, permute, read_prompts
from megallama.inference.sampling import Sampling
from megallama.rlhf.chat_model import ChatModel, Said, converse
from megallama.rlhf.ghost.attributes import Attribute
from megallama.rlhf.ghost.constraints import GHOST_KEY, answer_seed
from megallama.rlhf.ghost.records import at_first

TURNS = (2, 4, 6, 20)
"""At which the paper asks."""
SILENCE = "…"
"""Stands for an answer that says nothing, so that its dialogue goes on; no rule of ours takes it for kept."""
DRAW_TURNS = 5


class Trial(NamedTuple):
    """A dialogue's user turns, and what its first turn asks for."""

    users: tuple[str, ...]
    attribute: Attribute


class Count(NamedTuple):
    """At one turn: answers that keep the attribute, answers asked for, and dialogues that had ended before."""

    kept: int
    asked: int
    ended: int

    @property
    def share(self) -> float | None:
        return self.kept / self.asked if self.asked else None


def read_long_talks(path: str, turns: int) -> list[tuple[str, ...]]:
    """The first `turns` user turns of each dialogue.

    Raises:
        ValueError: a dialogue has fewer; names file and line.
    """
    found = []
    for prompt in read_prompts(path):
        users = tuple(message.content for message in prompt.messages if message.role == "user")
        if len(users) < turns:
            raise ValueError(
                f"{prompt.origin}: {len(users)} user turns, but the last one to look at is {turns}; give longer "
                f"dialogues, lower --turns, or join single prompts by --prompts"
            )
        found.append(users[:turns])
    return found


def joined_prompts(path: str, turns: int, count: int, seed: int) -> list[tuple[str, ...]]:
    """`count` dialogues, each of `turns` different prompts of a file (what the user says last), drawn at random.

    Raises:
        ValueError: the file has fewer prompts than a dialogue has turns.
    """
    pool = [prompt.messages[-1].content for prompt in read_prompts(path)]
    if len(pool) < turns:
        raise ValueError(f"{path}: {len(pool)} prompts make no dialogue of {turns} turns; give more, or lower --turns")
    orders = (permute(range(turns), len(pool), key(seed, GHOST_KEY, DRAW_TURNS, n)) for n in range(count))
    return [tuple(pool[place] for place in order) for order in orders]


def trials_of(talks: Sequence[tuple[str, ...]], attributes: Sequence[Attribute]) -> list[Trial]:
    """Each dialogue with an attribute, in turn."""
    return [Trial(users, attributes[n % len(attributes)]) for n, users in enumerate(talks)]


def answers_of(
    model: ChatModel,
    trials: Sequence[Trial],
    place: str,
    sampling: Sampling,
    seed: int,
    on_turn: Callable[[int], None] = lambda more: None,
) -> list[list[str]]:
    """The model's answers to each dialogue, as far as its context reaches. Collective."""
    scripts = [at_first(trial.attribute.instruction(), trial.users, place) for trial in trials]

    def stands(said: Said) -> str:
        return said.text or SILENCE

    return converse(model, scripts, sampling, lambda n, turn: answer_seed(seed, n, turn), stands, on_turn)


def count(trials: Sequence[Trial], answers: Sequence[Sequence[str]], turns: Sequence[int]) -> dict[int, Count]:
    """Turn (from 1) -> how many dialogues keep their attribute there."""
    found = {}
    for turn in turns:
        there = [(trial, said[turn - 1]) for trial, said in zip(trials, answers, strict=True) if len(said) >= turn]
        kept = sum(trial.attribute.kept(text) for trial, text in there)
        found[turn] = Count(kept, len(there), len(trials) - len(there))
    return found


def count_kinds(
    trials: Sequence[Trial], answers: Sequence[Sequence[str]], turns: Sequence[int]
) -> dict[str, dict[int, Count]]:
    """`count` for each kind of attribute, and for all of them."""
    found = {"all": count(trials, answers, turns)}
    for kind in dict.fromkeys(trial.attribute.kind for trial in trials):
        own = [n for n, trial in enumerate(trials) if trial.attribute.kind == kind]
        found[kind] = count([trials[n] for n in own], [answers[n] for n in own], turns)
    return found


def overflow(trials: Sequence[Trial], answers: Sequence[Sequence[str]], longest: int) -> str:
    """What to say of dialogues that no longer fit the context; "" where all do."""
    lengths = [len(said) for trial, said in zip(trials, answers, strict=True) if len(said) < len(trial.users)]
    if not lengths:
        return ""
    return (
        f"{len(lengths)} of {len(trials)} dialogues no longer fit the context of {longest} tokens, the first from turn "
        f"{min(lengths) + 1} on: they do not count from there on"
    )
