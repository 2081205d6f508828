"""Files of records as the training and held-out parts of a run: what fine-tuning and reward models have in common."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megallama.alignment import RecordsConfig
from megallama.config import Config
from megallama.data import ChatFormat, Encoded, Message, Origin, key, load_tokenizer, mix, permute
from megallama.data.record_files import split_name
from megallama.runtime.exchange import everyones
from megallama.runtime.mesh import Mesh
from megallama.runtime.progress import items_progress
from megallama.train.scoring import shares

T = TypeVar("T")
E = TypeVar("E")
CHUNK = 1 << 14
"""Records that the ranks tokenise at a time."""
HELD_OUT_KEY = 2
"""Sets the key by which records are held out apart from those that order them."""


@dataclass(frozen=True)
class Sources(Generic[T]):
    """Records of a run.

    Attributes:
        records: of all sources, one source after another.
        sizes: records of each source.
        valid: name -> held-out records.
        files: name -> SHA-256 of every file, for checkpoints.
    """

    records: list[T]
    sizes: tuple[int, ...]
    valid: dict[str, list[T]]
    files: dict[str, str]


def open_sources(
    sources: Sequence[RecordsConfig], valid: Sequence[str], read: Callable[[str], list[T]], config: Config, section: str
) -> Sources[T]:
    """Read all files. Without files of held-out records, data.split of each source is held out, at random by the seed.

    Raises:
        ValueError: no source, or a file or record is not valid (names file, line and field).
    """
    if not sources:
        raise ValueError(f"{section}.sources is empty: name at least one {{path: …}} of records (docs/formats.md)")
    records: list[T] = []
    sizes: list[int] = []
    held: dict[str, list[T]] = {name: read(name) for name in valid}
    for number, source in enumerate(sources):
        found = read(source.path)
        count = 0 if valid else round(config.data.split * len(found))
        order = permute(np.arange(len(found)), len(found), key(config.train.seed, number, HELD_OUT_KEY))
        if count:
            held[source.path] = [found[n] for n in sorted(order[:count].tolist())]
        kept = sorted(order[count:].tolist())
        if not kept:
            raise ValueError(f"{source.path}: data.split={config.data.split} holds out all {len(found)} records")
        records += [found[n] for n in kept]
        sizes.append(len(kept))
    names = [*(source.path for source in sources), *valid]
    return Sources(records, tuple(sizes), held, {f"data {name}": digest(name) for name in names})


def tokenised(records: Sequence[T], encode: Callable[[Sequence[T]], list[E]], mesh: Mesh) -> list[E]:
    """encode() of all records, worked out by the ranks together, each a part; the same on every rank. Collective.

    Raises:
        ValueError: as `encode`, on every rank.
    """
    world = mesh.world
    found: list[E] = []
    with items_progress("tokenised", len(records), world.rank == 0) as report:
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            mine, fault = shares(len(chunk), world.size)[world.rank], ""
            part: list[E] = []
            try:
                part = encode(chunk[mine.start : mine.stop])
            except ValueError as error:
                fault = str(error)
            parts = everyones((part, fault), world)
            if faults := [fault for _, fault in parts if fault]:
                raise ValueError(faults[0])
            found += chain.from_iterable(part for part, _ in parts)
            report(len(chunk))
    return found


def dialogue_ids(form: ChatFormat, dialogues: Sequence[tuple[Origin, Sequence[Message]]]) -> list[Encoded]:
    """Dialogues as ids: all at once, which is faster; one by one where a record is bad, which must be named.

    Raises:
        ValueError: a dialogue does not fit the template; names its place.
    """
    try:
        return form.dialogues([messages for _, messages in dialogues])
    except ValueError:
        for origin, messages in dialogues:
            with named(origin):
                form.dialogue(messages)
        raise


@contextmanager
def named(origin: Origin) -> Iterator[None]:
    """Errors inside say of which record they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def digest(path: str) -> str:
    """SHA-256 (hex) of a file, and of the names that its fields are read under, if they are others."""
    name, names = split_name(path)
    total = hashlib.sha256(repr(names).encode() if names else b"")
    with Path(name).open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def epoch_order(sizes: Sequence[int], shares: Sequence[float | None], seed: int, epoch: int) -> list[int]:
    """Numbers of the records (Sources.records) of one epoch, in its order."""
    source, index = mix(sizes, shares, seed, epoch)
    starts = np.cumsum([0, *sizes])
    return (starts[source] + index).tolist()


def with_steps(config: Config, samples: int, stage: str) -> Config:
    """train.steps as the epochs ask for, where it is 0; the last step takes what is left.

    Raises:
        ValueError: train.steps is more than the epochs have.
    """
    steps = math.ceil(samples / config.train.global_batch_size)
    if config.train.steps > steps:
        raise ValueError(
            f"train.steps={config.train.steps}, but the epochs of {stage} have {samples} samples, which are {steps} "
            f"steps; set train.steps to 0 (as many as there are), or raise {stage}.epochs"
        )
    return replace(config, train=replace(config.train, steps=config.train.steps or steps))


def chat_format(config: Config) -> ChatFormat:
    """How this run's dialogues become tokens.

    Raises:
        ValueError: data.tokenizer is missing or does not fit the model.
    """
    if not config.data.tokenizer:
        raise ValueError("data.tokenizer is empty: name the tokenizer of the model")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size={config.model.vocab_size}; "
            f"name the tokenizer that the model was trained with"
        )
    return ChatFormat(tokenizer, config.chat.separator)
