"""The fastest layouts of a model on a cluster: all that the engine accepts, less those that do not fit, ranked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from megallama.config import Config, ParallelConfig
from megallama.plan.job import Job, job_of
from megallama.plan.machine import Machine
from megallama.plan.memory import job_memory, persistent_bytes
from megallama.plan.step import Prediction, actions_of, least_seconds, predict

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 3, 4, 5, 6, 8, 10)
RECOMPUTE = ("none", "selective", "full")
DEEPEST = 64
"""Most pipeline ranks that are tried."""
RESERVE = 0.06
"""Of a GPU's memory: the allocator's slack, the libraries' own buffers."""
RIVAL = 1.5
"""A layout that takes so many times as long is not looked at for comparison."""
GIB = 2**30


class Choice(NamedTuple):
    """A layout with what it costs.

    Attributes:
        memory: bytes on the fullest rank.
    """

    config: Config
    job: Job
    prediction: Prediction
    memory: int


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        ranked: the fastest layouts that fit, the fastest first.
        valid: layouts that the engine accepts.
        roomy: the fastest layout if memory were no matter.
        by_tp: the fastest layout that fits for each number of tensor-parallel ranks that is a rival.
    """

    ranked: list[Choice]
    valid: int
    roomy: Choice
    by_tp: dict[int, Choice]


def candidates(config: Config, gpus: int, gpus_per_node: int) -> Iterator[Config]:
    """All valid configurations of layout, micro-batch, schedule and recomputation on `gpus` ranks; the rest stays as it
    is. Tensor-parallel ranks stay in a node."""
    for tp in (n for n in range(1, gpus_per_node + 1) if gpus % n == 0 and min(gpus, gpus_per_node) % n == 0):
        for pp in (n for n in range(1, min(DEEPEST, gpus // tp) + 1) if gpus % (tp * n) == 0):
            for parallel in _schedules(tp, pp):
                for micro in MICRO_BATCHES:
                    given = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
                    try:
                        given.validate(gpus)
                    except ValueError:
                        continue
                    yield given


def _schedules(tp: int, pp: int) -> Iterator[ParallelConfig]:
    for recompute in RECOMPUTE:
        yield ParallelConfig(tp=tp, pp=pp, recompute=recompute)
        if pp > 1:
            yield ParallelConfig(tp=tp, pp=pp, schedule="zero-bubble", recompute=recompute)
            for vpp in CHUNKS:
                yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, schedule="interleaved", recompute=recompute)


def search(config: Config, gpus: int, machine: Machine, top: int = 10) -> Found:
    """Rank the layouts of `config`'s model and batch.

    A layout's memory is worked out and its step simulated only while its lower bound (`least_seconds`) is below the
    slowest of the best so far.

    Raises:
        ValueError: no layout is valid, or none fits; says by how much.
    """
    if config.train.dtype != "bfloat16":
        raise ValueError(
            f"train.dtype={config.train.dtype} cannot be timed: clusters have the speed of bfloat16 alone; plan with "
            f"train.dtype bfloat16"
        )
    bounded = []
    for given in candidates(config, gpus, machine.cluster.gpus_per_node):
        job = job_of(given, gpus)
        bounded.append(Bounded(least_seconds(job, actions_of(job, machine)), given, job))
    if not bounded:
        raise ValueError(
            f"no layout of {gpus} GPUs is valid for a global batch of {config.train.global_batch_size} samples and "
            f"{config.model.num_hidden_layers} layers; choose a batch that more of {gpus}'s divisors divide"
        )
    bounded.sort(key=lambda entry: entry.seconds)
    limit = machine.cluster.memory_gib * GIB * (1 - RESERVE)
    ranked = _fastest(bounded, machine, top, limit)
    if not ranked:
        smallest = min(_memory(entry.job) for entry in bounded) / GIB
        raise ValueError(
            f"no layout fits: the leanest needs {smallest:.1f} GiB on a GPU, which has {machine.cluster.memory_gib:g} "
            f"less {RESERVE:.0%}; take more GPUs, or a smaller data.seq_length"
        )
    rivals = [entry for entry in bounded if entry.seconds < RIVAL * ranked[0].prediction.seconds]
    by_tp = {}
    for tp in sorted({entry.job.layout.tp for entry in rivals}):
        if best := _fastest([entry for entry in rivals if entry.job.layout.tp == tp], machine, 1, limit):
            by_tp[tp] = best[0]
    return Found(ranked, len(bounded), _fastest(bounded, machine, 1, math.inf)[0], by_tp)


class Bounded(NamedTuple):
    """A layout and what its step takes at least."""

    seconds: float
    config: Config
    job: Job


def _fastest(bounded: Sequence[Bounded], machine: Machine, top: int, limit: float) -> list[Choice]:
    """The `top` fastest of layouts, which come in the order of their bounds, that need `limit` bytes at most."""
    best: list[tuple[float, int, Choice]] = []  # the fastest first; of equally fast ones, who came first
    for number, entry in enumerate(bounded):
        if len(best) == top and entry.seconds >= best[-1][0]:
            break
        if math.isfinite(limit) and (persistent_bytes(entry.job) > limit or _memory(entry.job) > limit):
            continue
        prediction = _predicted(entry.job, machine)
        choice = Choice(entry.config, entry.job, prediction, _memory(entry.job))
        best = sorted([*best, (prediction.seconds, number, choice)], key=lambda found: found[:2])[:top]
    return [choice for _, _, choice in best]


_memory = lru_cache(maxsize=1 << 14)(lambda job: max(part.total for part in job_memory(job)))
"""Bytes on the fullest rank of a job."""
_predicted = lru_cache(maxsize=1 << 14)(predict)
