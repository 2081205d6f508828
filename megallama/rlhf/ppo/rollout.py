"""One iteration's answers and what PPO learns from them: which replica holds which row, and its token-wise tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from megallama.alignment import PpoConfig
from megallama.data import Order, key
from megallama.data.batch import IGNORE, Batch
from megallama.inference.sampling import Answer, Request, Sampling
from megallama.parallel.collectives import all_reduce
from megallama.rlhf.ppo.advantages import gae, moments, whiten_by
from megallama.rlhf.ppo.rewards import token_rewards
from megallama.rlhf.prompts import TokenPrompt
from megallama.runtime.mesh import Axis, Mesh

ANSWER_KEY = 3
"""Sets the seeds of answers apart from other keys of a run."""


@dataclass(frozen=True)
class Answered:
    """Prompts with their answers, the same on every rank.

    Attributes:
        prompts: one for each row.
        rows: ids of prompt and answer, EOS included where the answer has ended.
        log_probs: of each row's answer tokens, as the generator saw them.
        finished: the answer ended by itself.
    """

    prompts: list[TokenPrompt]
    rows: list[np.ndarray]
    log_probs: list[tuple[float, ...]]
    finished: list[bool]

    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(row) - len(prompt.ids) for row, prompt in zip(self.rows, self.prompts, strict=True)]


def prompt_numbers(count: int, first: int, size: int, seed: int) -> list[int]:
    """Prompts first … first + size - 1 of the run: `count` prompts in a fresh order every epoch."""
    return Order([1.0], [count], seed)(np.arange(first, first + size)).position.tolist()


def requests_of(
    prompts: Sequence[TokenPrompt], sampling: Sampling, longest: int, seeds: Sequence[int]
) -> list[Request]:
    """One for each prompt; no answer goes beyond `longest` tokens in all."""
    return [
        Request(p.ids, seed, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, longest - len(p.ids))))
        for p, seed in zip(prompts, seeds, strict=True)
    ]


def with_answers(prompts: Sequence[TokenPrompt], answers: Sequence[Answer]) -> Answered:
    return Answered(
        list(prompts),
        [np.array([*p.ids, *a.ids], np.int64) for p, a in zip(prompts, answers, strict=True)],
        [a.log_probs for a in answers],
        [a.finish != "length" for a in answers],
    )


def seeds_of(seed: int, numbers: Sequence[int]) -> list[int]:
    """A seed for each answer of a run, by its number."""
    return [int(word) >> 1 for word in key(seed, np.array(numbers), ANSWER_KEY)]


@dataclass
class Micro:
    """A micro-batch of answered rows on this replica; (N,) tensors hold its answer tokens, rows back to back.

    Attributes:
        rows: their numbers in the iteration.
        batch: tokens and labels; labels are the answers' tokens alone.
        bounds: of the rows in the (N,) tensors.
        old: log-probabilities under the policy that sampled.
        reference: under the reference.
        values: of the critic, before each token is chosen.
        advantages, returns: what the two models learn.
    """

    rows: list[int]
    batch: Batch
    bounds: tuple[int, ...]
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def flat(self, tokenwise: Tensor) -> Tensor:
        """(T,) or (T, 1) of the whole micro-batch -> (N,) of its answer tokens, on the CPU."""
        return tokenwise.view(-1).cpu()[self.batch.labels != IGNORE]

    def with_extras(self, **flat: Tensor) -> Batch:
        """The batch with (N,) tensors as (T,) extras, zero elsewhere."""
        answers = self.batch.labels != IGNORE
        extras = {}
        for name, values in flat.items():
            extras[name] = torch.zeros(self.batch.length, dtype=values.dtype)
            extras[name][answers] = values
        return replace(self.batch, extras=extras)


def replica_rows(rows: int, mini_batch: int, micro: int, dp: Axis) -> list[list[list[int]]]:
    """[mini-batch][micro-batch] -> numbers of this replica's rows. A mini-batch is the same rows for any dp."""
    share = mini_batch // dp.size
    starts = [mini + dp.rank * share for mini in range(0, rows, mini_batch)]
    return [[list(range(at, at + micro)) for at in range(start, start + share, micro)] for start in starts]


def micro_batch(answered: Answered, rows: list[int], multiple: int) -> Micro:
    """The batch of some rows; its tensors are still empty."""
    packed = []
    for n in rows:
        ids, start = torch.from_numpy(answered.rows[n]), len(answered.prompts[n].ids)
        labels = ids[1:].clone()
        labels[: start - 1] = IGNORE
        packed.append((ids[:-1], labels))
    batch = Batch.pack(packed, multiple)
    bounds = tuple(accumulate((int((labels != IGNORE).sum()) for _, labels in packed), initial=0))
    nothing = torch.empty(0)
    return Micro(rows, batch, bounds, nothing, nothing, nothing, nothing, nothing)


def estimate_advantages(micros: Sequence[Micro], scores: Tensor, ppo: PpoConfig, mesh: Mesh) -> None:
    """Fill advantages and returns; advantages are whitened over the answer tokens of all replicas. Collective over dp.

    Args:
        scores: (rows,) whitened, of the whole iteration.
    """
    rows = [n for micro in micros for n in micro.rows]
    ends = accumulate((micro.bounds[-1] for micro in micros), initial=0)
    bounds = (0, *(end + bound for end, micro in zip(ends, micros, strict=False) for bound in micro.bounds[1:]))
    old, reference, values = (
        torch.cat([getattr(micro, name) for micro in micros]) for name in ("old", "reference", "values")
    )
    rewards = token_rewards(scores[rows], old, reference, bounds, ppo.beta)
    advantages, returns = gae(rewards, values, bounds, ppo.discount, ppo.gae_lambda)
    advantages = whiten_by(advantages, all_reduce(moments(advantages).to(mesh.device), mesh.dp).cpu())
    sizes = [micro.bounds[-1] for micro in micros]
    for micro, a, r in zip(micros, advantages.split(sizes), returns.split(sizes), strict=True):
        micro.advantages, micro.returns = a, r


def kl_of_rows(micro: Micro) -> list[float]:
    """Each row's sum of log pi - log pi_ref over its answer: an estimate of KL(pi || pi_ref) for its prompt."""
    gaps = micro.old - micro.reference
    return [float(gaps[lo:hi].sum()) for lo, hi in pairwise(micro.bounds)]
