"""Scores of whole answers by a reward model on the mesh, whatever the layout and the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megallama.data.batch import Batch
from megallama.data.rows import scored_rows
from megallama.parallel.collectives import all_reduce
from megallama.train.trainer import Trainer


def last_values(values: Tensor, batch: Batch) -> Tensor:
    """A scalar head's output (T, 1) -> (rows,), the value at each row's last token."""
    return values[batch.extras["ends"], 0]


def shares(count: int, parts: int) -> list[range]:
    """`count` things as `parts` runs of consecutive ones, of equal length up to one; a single thing is in the first."""
    ends = [-(-count * n // parts) for n in range(parts + 1)]
    return [range(lo, hi) for lo, hi in pairwise(ends)]


def budgeted(numbers: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive runs of `numbers` whose lengths add up to `budget` at most; a longer one is alone."""
    taken: list[int] = []
    total = 0
    for n in numbers:
        if taken and total + lengths[n] > budget:
            yield taken
            taken, total = [], 0
        taken.append(n)
        total += lengths[n]
    if taken:
        yield taken


def scores(trainer: Trainer, rows: Sequence[np.ndarray]) -> Tensor:
    """(rows,) fp64 on the CPU, equal on every rank: the reward model's score of each row of ids. Collective.

    Each data-parallel replica takes a run of rows, in micro-batches of at most train.micro_batch_size * data.seq_length
    tokens.
    """
    mesh, config = trainer.mesh, trainer.config
    out = torch.zeros(len(rows), dtype=torch.float64, device=mesh.device)
    mine = shares(len(rows), mesh.dp.size)[mesh.dp.rank]
    lengths = [len(row) for row in rows]
    taken = list(budgeted(mine, lengths, config.train.micro_batch_size * config.data.seq_length))
    if taken:
        micros = [scored_rows([rows[n] for n in numbers], mesh.tp.size) for numbers in taken]
        for numbers, found in zip(taken, trainer.infer(micros, last_values), strict=True):
            out[numbers] = found.double()
    return all_reduce(out, mesh.dp).cpu()
