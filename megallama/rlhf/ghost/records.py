"""Ghost attention (the paper, section 3.3): dialogues in which an instruction from the first turn holds to the end.

A model answers with the instruction attached to every user turn; the record to fine-tune on shows it in the first turn
alone, often shortened, and trains nothing but the last answer: the earlier ones were given under another prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megallama.data import ChatFormat, Message, Origin, read_prompts
from megallama.inference.sampling import Sampling
from megallama.rlhf.chat_model import ChatModel, Said, Script, converse, is_first_rank
from megallama.rlhf.ghost.constraints import Instruction, Lists, answer_seed, draw, is_short
from megallama.rlhf.parts import Parts
from megallama.runtime.exchange import from_first
from megallama.runtime.progress import items_progress

SYSTEM, USER = "system", "user"
PLACES = (SYSTEM, USER)
"""Where the instruction stands in the first turn: a system message, or before the user's text."""
LEAST_TURNS = 2
"""With one turn there is nothing to remember."""
OUTPUT = "gatt.jsonl"


class Talk(NamedTuple):
    """The user's side of a dialogue; `place` is its number in the file, from 0."""

    place: int
    key: str
    users: tuple[str, ...]
    origin: Origin


def read_talks(path: str, most_turns: int) -> tuple[list[Talk], int]:
    """The user turns of a file's dialogues, at most `most_turns` of each, and how many dialogues had too few.

    Raises:
        ValueError: a record is not valid, or no dialogue has two user turns.
    """
    prompts = read_prompts(path)
    talks = [
        Talk(n, p.key, tuple(m.content for m in p.messages if m.role == "user")[:most_turns], p.origin)
        for n, p in enumerate(prompts)
    ]
    fit = [talk for talk in talks if len(talk.users) >= LEAST_TURNS]
    if not fit:
        raise ValueError(
            f"{path}: none of its {len(talks)} dialogues has {LEAST_TURNS} user turns or more; give longer ones"
        )
    return fit, len(talks) - len(fit)


def everywhere(instruction: str, users: Sequence[str]) -> Script:
    """The dialogue that is sampled: the instruction before the user's text in every turn."""
    return Script("", tuple(f"{instruction}\n\n{user}" for user in users))


def at_first(instruction: str, users: Sequence[str], place: str) -> Script:
    """The dialogue that is trained or tested: the instruction in the first turn alone."""
    if place == SYSTEM:
        return Script(instruction, tuple(users))
    return Script("", (f"{instruction}\n\n{users[0]}", *users[1:]))


def training_messages(instruction: str, users: Sequence[str], answers: Sequence[str], place: str) -> list[Message]:
    """A dialogue of as many turns as there are answers, of which the last alone carries loss."""
    *earlier, last = at_first(instruction, users[: len(answers)], place).messages(answers)
    return [*(m._replace(train=m.role != "assistant") for m in earlier), last]


@dataclass(frozen=True)
class Recipe:
    """What the records depend on beside dialogues, lists and model.

    Args:
        sampling: of the answers.
        seed: of instructions and answers.
        place: one of PLACES.
        part: dialogues between two saves.
    """

    sampling: Sampling
    seed: int = 0
    place: str = SYSTEM
    part: int = 256


def check_room(talks: Iterable[Talk], form: ChatFormat, longest: int, lists: Lists, recipe: Recipe) -> None:
    """Every dialogue must fit, however long its answers become: found before the first is sampled.

    Raises:
        ValueError: one might not; names file, line and the numbers.
    """
    most = recipe.sampling.max_new_tokens
    for talk in talks:
        script = everywhere(draw(lists, recipe.seed, talk.place).full(), talk.users)
        asked = sum(len(form.prompt([Message("user", user)])) for user in script.users)
        turns = len(talk.users)
        if asked + turns * most + turns - 1 > longest:
            raise ValueError(
                f"{talk.origin}: {turns} user turns with the instruction have {asked} tokens, and {turns} answers of "
                f"up to {most} do not fit beside them in the model's {longest}; lower --max-new-tokens or --turns, or "
                f"remove the record"
            )


def settled(said: Said) -> str:
    """Answers that were cut off, or say nothing, end a dialogue: neither they nor what follows them is to be learnt."""
    return said.text if said.finished else ""


def sample(model: ChatModel, talks: Sequence[Talk], lists: Lists, recipe: Recipe) -> list[dict[str, Any]]:
    """The records of some dialogues; those that end before their second answer give none. Collective."""
    drawn = [draw(lists, recipe.seed, talk.place) for talk in talks]
    scripts = [everywhere(one.full(), talk.users) for one, talk in zip(drawn, talks, strict=True)]
    answers = converse(
        model, scripts, recipe.sampling, lambda n, turn: answer_seed(recipe.seed, talks[n].place, turn), settled
    )
    return [
        record(talk, instruction, said, recipe, str(model.folder))
        for talk, instruction, said in zip(talks, drawn, answers, strict=True)
        if len(said) >= LEAST_TURNS
    ]


def record(talk: Talk, instruction: Instruction, answers: Sequence[str], recipe: Recipe, model: str) -> dict[str, Any]:
    """A chat record with where it comes from."""
    short = is_short(recipe.seed, talk.place)
    shown = instruction.short() if short else instruction.full()
    return {
        "id": talk.key,
        "messages": [
            {"role": m.role, "content": m.content} | ({"weight": int(m.train)} if m.role == "assistant" else {})
            for m in training_messages(shown, talk.users, answers, recipe.place)
        ],
        "source": "gatt",
        "constraints": dict(instruction.constraints),
        "instruction": instruction.full(),
        "short": short,
        "turns": len(answers),
        "asked": len(talk.users),
        "model": model,
        "seed": recipe.seed,
        "temperature": recipe.sampling.temperature,
        "top_p": recipe.sampling.top_p,
    }


class Summary(NamedTuple):
    """What has been made: `shortened` dialogues ended before their last turn, `lost` ones before their second."""

    path: Path
    records: int
    short_instructions: int
    shortened: int
    lost: int


def build(
    model: ChatModel,
    talks: Sequence[Talk],
    lists: Lists,
    recipe: Recipe,
    folder: Path,
    settings: Mapping[str, Any],
) -> Summary | None:
    """Make all records in parts under `folder`, those that are missing, and join them. Collective.

    Args:
        settings: all that the records depend on; a folder of others is refused.

    Returns:
        On rank 0 what has been made, elsewhere None.
    """
    first = is_first_rank()
    batches = [talks[at : at + recipe.part] for at in range(0, len(talks), recipe.part)]
    parts = Parts(folder, settings, len(batches)) if first else None
    missing = from_first(lambda: parts.missing() if parts else [], model.mesh.world, model.mesh.device)
    with items_progress("dialogues", sum(len(batches[n]) for n in missing), first) as report:
        for number in missing:
            records = sample(model, batches[number], lists, recipe)
            if parts is not None:
                parts.write(number, records)
            report(len(batches[number]))
    if parts is None:
        return None
    made = list(parts.records())
    if not made:
        raise ValueError(
            f"all {len(talks)} dialogues ended before their second answer: {model.folder} does not end its answers "
            f"within --max-new-tokens {recipe.sampling.max_new_tokens}; raise it, or use a chat model"
        )
    return Summary(
        parts.join(OUTPUT),
        len(made),
        sum(one["short"] for one in made),
        sum(one["turns"] < one["asked"] for one in made),
        len(talks) - len(made),
    )
