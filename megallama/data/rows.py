"""Loaders of dialogues and of preference pairs: their records are tokenised at the start and kept as rows of ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batch import IGNORE, Batch
from .chat import Encoded
from .loader import Loader, Volume

FILLER = (torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE))
"""A row without labels: what a replica computes where a step has fewer samples than replicas or micro-batches."""


def supervised(dialogue: Encoded) -> tuple[Tensor, Tensor]:
    """A dialogue of n ids -> (tokens, labels), n - 1 each: labels are the answers' tokens and their EOS alone."""
    ids, train = torch.from_numpy(dialogue.ids).long(), torch.from_numpy(dialogue.train)
    return ids[:-1], ids[1:].masked_fill(~train[1:], IGNORE)


class DialogueLoader(Loader):
    """Sequences of packed dialogues; a step beyond the last sequence, or over its end, is padded by empty ones.

    Args:
        dialogues: all of them.
        sequences: for each sequence the numbers of its dialogues.
        isolate: dialogues of a sequence do not attend to each other, and each has positions of its own.
        multiple: a micro-batch is padded to a multiple of this many tokens (parallel.tp).
    """

    def __init__(
        self, dialogues: Sequence[Encoded], sequences: Sequence[Sequence[int]], isolate: bool = True, multiple: int = 1
    ):
        self.dialogues, self.sequences, self.isolate, self.multiple = dialogues, sequences, isolate, multiple
        self._volumes = Volumes(
            (sum(len(dialogues[n].ids) - 1 for n in sequence), len(sequence) if isolate else 1)
            for sequence in sequences
        )

    def __len__(self) -> int:
        return len(self.sequences)

    def micros(self, first_sample: int, dp_rank: int, dp_size: int, micro_batch_size: int, count: int) -> list[Batch]:
        first = first_sample + dp_rank * micro_batch_size * count
        return [self._pack(first + m * micro_batch_size, micro_batch_size) for m in range(count)]

    def volume(self, first_sample: int, count: int) -> Volume:
        return self._volumes(first_sample, count)

    def _pack(self, first: int, size: int) -> Batch:
        rows: list[tuple[Tensor, Tensor]] = []
        for sequence in self.sequences[first : first + size]:
            parts = [supervised(self.dialogues[n]) for n in sequence]
            rows += parts if self.isolate else [_joined(parts)]
        return Batch.pack(rows or [FILLER], self.multiple)


class Volumes:
    """Tokens and rows of samples 0, 1, … as running sums.

    Args:
        each: (tokens, rows) of every sample.
    """

    def __init__(self, each: Iterable[tuple[int, int]]):
        sizes = np.array([(0, 0), *each], np.int64)
        self._ends = sizes.cumsum(0)

    def __call__(self, first: int, count: int) -> Volume:
        """Of samples first … first + count - 1, as far as there are any."""
        last = len(self._ends) - 1
        tokens, rows = self._ends[min(first + count, last)] - self._ends[min(first, last)]
        return Volume(int(tokens), int(rows))


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, labels = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(labels)


class TokenPair(NamedTuple):
    """Two answers to one prompt, as ids of prompt and answer, EOS included.

    Attributes:
        margin: by which the chosen one's score should be higher.
        safe: 1, 0 or nan (nobody said) for the chosen and the rejected one.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    margin: float
    safe: tuple[float, float]


def scored_rows(rows: Sequence[np.ndarray], multiple: int = 1) -> Batch:
    """Rows of ids whose scores are read at their last tokens, `extras["ends"]`."""
    tokens = [torch.from_numpy(row).long() for row in rows]
    ends = torch.tensor([t.numel() for t in tokens], dtype=torch.int64).cumsum(0) - 1
    packed = [(t, torch.full_like(t, IGNORE)) for t in tokens] or [FILLER]
    return _with(Batch.pack(packed, multiple), len(rows), {"ends": ends})


def _with(batch: Batch, count: int, extras: dict[str, Tensor]) -> Batch:
    return Batch(batch.tokens, batch.labels, batch.positions, batch.bounds, count, extras)


class PairLoader(Loader):
    """Preference pairs in a given order; a step over the end has fewer of them.

    Args:
        pairs: all of them.
        order: numbers of pairs, one after another.
        multiple: a micro-batch is padded to a multiple of this many tokens (parallel.tp).
    """

    def __init__(self, pairs: Sequence[TokenPair], order: Sequence[int], multiple: int = 1):
        self.pairs, self.order, self.multiple = pairs, order, multiple
        self._volumes = Volumes((len(pairs[n].chosen) + len(pairs[n].rejected), 2) for n in order)

    def __len__(self) -> int:
        return len(self.order)

    def micros(self, first_sample: int, dp_rank: int, dp_size: int, micro_batch_size: int, count: int) -> list[Batch]:
        first = first_sample + dp_rank * micro_batch_size * count
        return [self._pack(first + m * micro_batch_size, micro_batch_size) for m in range(count)]

    def volume(self, first_sample: int, count: int) -> Volume:
        return self._volumes(first_sample, count)

    def _pack(self, first: int, size: int) -> Batch:
        taken = [self.pairs[n] for n in self.order[first : first + size]]
        batch = scored_rows([row for pair in taken for row in (pair.chosen, pair.rejected)], self.multiple)
        margin = torch.tensor([pair.margin for pair in taken])
        safe = torch.tensor([flag for pair in taken for flag in pair.safe])
        return _with(batch, len(taken), {**batch.extras, "margin": margin, "safe": safe})
