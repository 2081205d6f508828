"""Bytes on one rank of each pipeline position at the moment of the step when they are most.

Weights, gradients and the optimizer's state follow the buckets of `optim`, paddings included. `activations` knows what
one micro-batch keeps on a stage; every rank's row of the lowered program, which the engine interprets too, tells how
many of them live at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from megallama.config import Config
from megallama.pipeline import Action, Event, build, lower
from megallama.plan.activations import Bytes, StageBytes, deferred, stage_bytes, tensors_of
from megallama.plan.job import WIDTH, Job, job_of
from megallama.plan.work import block_parameters

ALIGN = 64
"""Elements that a dp rank's shard of a bucket is padded to (optim/bucket.py)."""

BUCKET_ELEMENTS = 1 << 25
"""From which on a bucket takes no further unit (optim/zero1.py)."""

BATCH_BYTES = 3 * 8
"""Of a token in a micro-batch: id, label and position; all micro-batches of a step lie on the device."""


class RankMemory(NamedTuple):
    """Bytes by part on one rank; the last three as they stand when their sum is largest. What the libraries and the
    allocator take for themselves is not in it.

    Attributes:
        activations: kept for backward, waiting for their weight gradients, and the block that is being worked on.
        logits: of the head and its loss.
        buffers: hidden states on their way between stages, gathers inside tp, sums on their way into the gradients,
            reduced gradients, and the batch.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(self)


def rank_memory(config: Config, world_size: int) -> tuple[RankMemory, ...]:
    """Bytes on a rank at each pipeline position of a valid configuration (all its tp and dp ranks hold the same)."""
    return job_memory(job_of(config, world_size))


def job_memory(job: Job) -> tuple[RankMemory, ...]:
    """Bytes on a rank at each pipeline position (see the top of this file)."""
    stages = _stages(job)
    return tuple(
        _persistent(job, rank)._replace(**_peak(job, moments, stages)._asdict())
        for rank, moments in enumerate(job_moments(job))
    )


def persistent_bytes(job: Job) -> int:
    """What lies on the fullest rank between steps: quickly told, and never more than a step needs."""
    return max(_persistent(job, rank).total for rank in range(job.layout.pp))


# --- parameters and optimizer -----------------------------------------------------------------------------------------


class Buckets(NamedTuple):
    """Elements of each bucket of a stage on one rank, paddings included.

    Attributes:
        early: those that have all their gradients before the stage's first block has its own.
    """

    early: list[int]
    late: list[int]


def stage_buckets(job: Job, stage: int) -> Buckets:
    """The buckets of `stage`: units from last to first, and a tied embedding by itself (Zero1._bucketise)."""
    shape, layout = job.shape, job.layout
    vocabulary = -(-shape.vocab // layout.tp) * shape.hidden
    first, last = stage == 0, stage == layout.stages - 1
    head = [shape.hidden if shape.scalar else 0 if shape.tied else vocabulary, shape.hidden] if last else []
    blocks = [block_parameters(job)] * job.layers[stage]
    above, bucket = _fill([*head, *blocks[1:]], 0)
    below, rest = _fill([*blocks[:1], *([vocabulary] if first and not shape.tied else [])], bucket)
    tied = [vocabulary] if shape.tied and (first or last) else []
    quantum = layout.dp * ALIGN
    early, late = [*above, *([] if first else tied)], [*below, *([rest] if rest else []), *(tied if first else [])]
    return Buckets(*([-(-size // quantum) * quantum for size in sizes] for sizes in (early, late)))


def _fill(units: list[int], bucket: int) -> tuple[list[int], int]:
    """The buckets that `units` fill, the first of which holds `bucket` elements already, and what is in the next."""
    full: list[int] = []
    for unit in units:
        bucket += unit
        if bucket >= BUCKET_ELEMENTS:
            full.append(bucket)
            bucket = 0
    return full, bucket


def _persistent(job: Job, rank: int) -> RankMemory:
    """What lies on a rank between steps."""
    width, engine = WIDTH[job.dtype], job.engine
    wide = max(width, 4)
    stages = job.layout.stages_of(rank)
    elements = sum(sum(sizes) for stage in stages for sizes in stage_buckets(job, stage))
    shard = elements // job.layout.dp if engine.sharded_optimizer else elements
    return RankMemory(
        weights=elements * width,
        gradients=elements * max(engine.gradient_bytes, width),
        masters=shard * wide if wide > width else 0,
        moments=2 * shard * wide,
        activations=0,
        logits=0,
        buffers=0,
    )


def _stages(job: Job) -> list[StageBytes]:
    """All stages, with the shards that reductions make; over one replica the sum is what is there already."""
    dp, width = job.layout.dp, max(WIDTH[job.dtype], 4)

    def shard(elements: int) -> Bytes:
        return Bytes(buffers=elements // dp * width if dp > 1 and job.engine.sharded_optimizer else 0)

    def one(stage: int) -> StageBytes:
        early, late = map(sum, stage_buckets(job, stage))
        return stage_bytes(job, stage, shard(early + late), shard(early))

    last = job.layout.stages - 1
    alike = [(layers, stage == 0, stage == last) for stage, layers in enumerate(job.layers)]
    made = {key: one(alike.index(key)) for key in set(alike)}
    return [made[key] for key in alike]


# --- the step ---------------------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """What a rank holds when an action starts (B, W) or ends (F, G).

    Attributes:
        closing: the action is its stage's last contribution to the gradients.
        held, waiting, reduced: for each of the rank's stages, micro-batches between F and B and between B and W, and
            whether the gradients have been reduced.
        boundary: hidden states and their gradients that have arrived early or are being sent.
    """

    kind: str
    stage: int
    closing: bool
    held: tuple[int, ...]
    waiting: tuple[int, ...]
    reduced: tuple[int, ...]
    boundary: int

    def sizes(self) -> tuple[int, ...]:
        return (*self.held, *self.waiting, *self.reduced, self.boundary)


ENOUGH = 4
"""Micro-batches a pipeline rank from which on a step of more has the same moments, but for GPipe's."""


def job_moments(job: Job) -> tuple[tuple[Moment, ...], ...]:
    """The moments of each pipeline rank that can be the largest."""
    layout, micros = job.layout, job.micros
    if layout.schedule != "gpipe":
        micros = min(micros, ENOUGH * layout.pp)
    return program_moments(layout.schedule, layout.pp, micros, layout.vpp)


@lru_cache(maxsize=1024)
def program_moments(schedule: str, pp: int, micros: int, vpp: int) -> tuple[tuple[Moment, ...], ...]:
    """For each rank the moments of the lowered program that no other of the same action and stage exceeds in all."""
    return tuple(_largest(_walk(row, pp, vpp)) for row in lower(build(schedule, pp, micros, vpp)))


def _walk(row: Sequence[Action], pp: int, vpp: int) -> set[Moment]:
    """Follow a rank's row as the engine does, which lets as many sends be under way as there are ranks."""
    held, waiting, reduced = [0] * vpp, [0] * vpp, [0] * vpp
    split, last = any(action.kind == "W" for action in row), pp * vpp - 1
    contributes = "W" if split else "B"
    left = Counter(action.stage for action in row if action.kind == contributes)
    received = made = sent = 0
    moments: set[Moment] = set()
    for kind, stage, _ in row:
        chunk = stage // pp
        if kind in ("RF", "RB"):
            received += 1
        elif kind in ("SF", "SB"):
            made, sent = made - 1, min(sent + 1, pp)
        else:
            left[stage] -= kind == contributes
            closing = kind == contributes and not left[stage]
            # An action takes what it received as it starts; what a forward makes is there as it ends.
            received -= (kind == "F" and stage > 0) or (kind == "B" and stage < last)
            made += kind == "F" and stage < last
            held[chunk] += kind == "F"
            reduced[chunk] += kind == "G"
            if kind != "F" or stage == last:  # only the loss needs more than the action that follows a forward
                lives = tuple(held), tuple(waiting), tuple(reduced), received + made + sent
                moments.add(Moment(kind, stage, closing, *lives))
            held[chunk] -= kind == "B"
            waiting[chunk] += (kind == "B" and split) - (kind == "W")
            made += kind == "B" and stage > 0
    return moments


def _largest(moments: set[Moment]) -> tuple[Moment, ...]:
    """Those that no other of the same kind, stage and closing reaches in everything that it holds."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: sum(m.sizes()), reverse=True):
        rivals = (other for other in kept if other[:3] == moment[:3])
        if not any(all(a <= b for a, b in zip(moment.sizes(), rival.sizes(), strict=True)) for rival in rivals):
            kept.append(moment)
    return tuple(kept)


def _peak(job: Job, moments: Sequence[Moment], stages: Sequence[StageBytes]) -> Bytes:
    """The largest of a rank's moments."""
    own = stages[moments[0].stage % job.layout.pp :: job.layout.pp]
    parts = [
        *(s.held for s in own),
        *(s.waiting for s in own),
        *(s.reduced for s in own),
        Bytes(buffers=tensors_of(job).row),
    ]
    totals = [sum(part) for part in parts]

    def extra(moment: Moment) -> Bytes:
        return stages[moment.stage].extra[moment.kind, moment.closing]

    largest = max(moments, key=lambda moment: sum(map(mul, totals, moment.sizes())) + sum(extra(moment)))
    peak = extra(largest)
    for part, count in zip(parts, largest.sizes(), strict=True):
        peak = peak.plus(part, count)
    return peak.plus(Bytes(buffers=BATCH_BYTES * job.tokens * job.micros))


def memory_over_time(job: Job, events: Sequence[Event]) -> list[list[tuple[float, int]]]:
    """For each pipeline rank (time, bytes from then on) of a step that `pipeline.simulate` has timed, for a picture.

    A forward's tensors count from its start; what an action needs beside what is kept counts while it runs. Weights,
    gradients and the optimizer's state are the floor. The batch, reduced gradients and tensors on their way between
    ranks, which the events do not tell of, are not in it.
    """
    stages = _stages(job)
    changes: list[dict[float, int]] = [{0.0: sum(_persistent(job, rank))} for rank in range(job.layout.pp)]
    split = deferred(job)
    for (kind, stage, _), rank, start, end in events:
        own, change = stages[stage], changes[rank]
        held, waiting = sum(own.held), sum(own.waiting)
        working = sum(own.extra[kind, False])
        begins = working + (held if kind == "F" else 0)
        ends = {"F": 0, "B": (waiting if split else 0) - held, "W": -waiting}[kind] - working
        change[start] = change.get(start, 0) + begins
        change[end] = change.get(end, 0) + ends
    return [list(zip(sorted(c), accumulate(c[time] for time in sorted(c)), strict=True)) for c in changes]
