"""A frozen chat model on the ranks of a launch: it says the next answers of dialogues, or many turns of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megallama.alignment import ChatConfig
from megallama.checkpoint.formats.tokenizer_files import tokenizer_in
from megallama.config import SCALAR, Config, DataConfig, ParallelConfig, TrainConfig
from megallama.data import ChatFormat, Message
from megallama.inference.generator import Generator
from megallama.inference.sampling import Request, Sampling
from megallama.runtime.faults import guard
from megallama.runtime.launch import TIMEOUT, connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.models import adopt, frozen, open_weights
from megallama.train.sources import chat_format
from megallama.train.trainer import Trainer


@contextmanager
def launched() -> Iterator[torch.device]:
    """Join the other ranks and end all together if one fails. Meshes follow, one for each model's shape.

    Raises:
        SystemExit: something failed; one line on stderr has told of it.
    """
    world = resolve(os.environ)
    store = rendezvous(world)
    with guard(world, store, lambda: ""):
        yield connect(world, store)
    disconnect()


def is_first_rank() -> bool:
    """Whether this rank speaks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


@dataclass(frozen=True)
class Setup:
    """How a chat model runs; data-parallel replicas are what tp and pp leave of the ranks.

    Args:
        tokenizer: of the model; None = the one in its folder.
        separator: as chat.separator in its training.
        tp, pp: tensor-parallel and pipeline ranks.
        dtype: bfloat16, float32 or float64.
        rows: most dialogues answered together on a replica.
    """

    tokenizer: str | None = None
    separator: str | None = None
    tp: int = 1
    pp: int = 1
    dtype: str = "bfloat16"
    rows: int = 64


class Said(NamedTuple):
    """An answer: `text` is "" where it cannot stand in a dialogue (blanks, or it spells a special token); `finished`
    says that the model ended it."""

    text: str
    finished: bool


class ChatModel:
    """A frozen model that answers dialogues. Every rank makes one; its calls are collective.

    Attributes:
        folder: where its weights lie.
        longest: tokens that a prompt and its answer may have together.
    """

    def __init__(self, trainer: Trainer, form: ChatFormat, folder: Path, rows: int):
        self.trainer, self.form, self.folder = trainer, form, folder
        self.longest = trainer.config.model.max_position_embeddings
        self._generator = Generator(trainer, form.tokenizer, rows)

    @property
    def mesh(self) -> Mesh:
        return self.trainer.mesh

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Said]:
        """An answer to each prompt of ids (ChatFormat.prompt), equal on every rank."""
        requests = [Request(tuple(ids), seed, sampling) for ids, seed in zip(prompts, seeds, strict=True)]
        found = self._generator.run(requests)
        return [Said(self._standing(self.form.text(answer.ids)), answer.finish != "length") for answer in found]

    def _standing(self, text: str) -> str:
        try:
            self.form.answer(text)
            text.encode()
        except ValueError:
            return ""
        return text


def open_chat_model(path: str, setup: Setup, device: torch.device) -> ChatModel:
    """A chat model from a run, a checkpoint or a Hugging Face folder. Collective.

    Raises:
        ValueError: the folder holds no language model, or neither layout nor tokenizer fits it.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    source = open_weights(path, lambda line: print(line, file=sys.stderr))
    if source.model.head == SCALAR:
        raise ValueError(f"{path} is a reward model, which answers nothing; name a language model")
    tokenizer = setup.tokenizer or tokenizer_in(source.folder)
    if tokenizer is None:
        raise ValueError(f"{source.folder} has no tokenizer; give the one that it was trained with as --tokenizer")
    config = Config(
        parallel=ParallelConfig(tp=setup.tp, pp=setup.pp),
        data=DataConfig(seq_length=source.model.max_position_embeddings, tokenizer=str(tokenizer)),
        train=TrainConfig(micro_batch_size=1, global_batch_size=world, dtype=setup.dtype),
        chat=ChatConfig(setup.separator),
    )
    config = adopt(config, source.model, source.folder)
    config.validate(world)
    form, model = chat_format(config), config.model
    mesh = build_mesh(setup.tp, setup.pp, model.num_key_value_heads, model.tied, device, TIMEOUT)
    return ChatModel(frozen(config, mesh, source), form, source.folder, setup.rows)


class Script(NamedTuple):
    """The side of a dialogue that is given: the system message ("" = none), and what the user says in each turn."""

    system: str
    users: tuple[str, ...]

    def messages(self, answers: Sequence[str]) -> list[Message]:
        """The dialogue up to the user's message after these answers; up to the last answer where the user has no more
        to say."""
        found = [Message("system", self.system)] * bool(self.system)
        for n, user in enumerate(self.users[: len(answers) + 1]):
            found.append(Message("user", user))
            found += [Message("assistant", answer) for answer in answers[n : n + 1]]
        return found


def converse(
    model: ChatModel,
    scripts: Sequence[Script],
    sampling: Sampling,
    seed_of: Callable[[int, int], int],
    stands: Callable[[Said], str],
    on_turn: Callable[[int], None] = lambda more: None,
) -> list[list[str]]:
    """Answer dialogues turn by turn, all of them together; the answers of each. Collective.

    A dialogue ends early where its prompt leaves no room for an answer of sampling.max_new_tokens.

    Args:
        seed_of: (number of the script, turn from 0) -> the seed of that answer.
        stands: what of an answer stands in the dialogue; "" = the dialogue ends before it.
        on_turn: told that 1 turn more is done.
    """
    answers: list[list[str]] = [[] for _ in scripts]
    going = list(range(len(scripts)))
    for turn in range(max((len(script.users) for script in scripts), default=0)):
        prompts = {n: model.form.prompt(scripts[n].messages(answers[n])) for n in going if turn < len(scripts[n].users)}
        going = [n for n, ids in prompts.items() if len(ids) + sampling.max_new_tokens <= model.longest]
        said = model.answer([prompts[n] for n in going], sampling, [seed_of(n, turn) for n in going])
        kept = {n: text for n, one in zip(going, said, strict=True) if (text := stands(one))}
        for n, text in kept.items():
            answers[n].append(text)
        going = list(kept)
        on_turn(1)
    return answers
