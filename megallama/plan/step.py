"""The time of one training step: the engine's own program with the seconds of its actions, and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from megallama.pipeline import Action, Event, Program, build, simulate
from megallama.plan.job import WIDTH, Job
from megallama.plan.machine import Machine
from megallama.plan.memory import BUCKET_ELEMENTS
from megallama.plan.work import (
    block_seconds,
    embedding_seconds,
    exchange_seconds,
    head_seconds,
    stage_parameters,
)

ROUNDS = 3
"""Micro-batches for each pipeline rank after which the pipeline repeats itself."""
ADAM_BYTES = {True: 30, False: 34}
"""Moved for a parameter by AdamW: gradient, master and moments read, the last three and the weight written; 34 where
the norm reads all gradients once more on every replica."""


class Prediction(NamedTuple):
    """Seconds of a step and what they are made of; the parts are those of the rank that is busiest.

    Attributes:
        seconds: of the whole step.
        compute: forward, backward and recomputation without `collectives`.
        collectives: of the tensor-parallel ranks.
        bubble: waiting of the busiest pipeline rank, and hops that nothing hides.
        replicas: reduction of gradients and gathering of weights that nothing hides.
        optimizer: the update.
        overhead: what belongs to nothing else.
    """

    seconds: float
    compute: float
    collectives: float
    bubble: float
    replicas: float
    optimizer: float
    overhead: float


class Actions(NamedTuple):
    """Seconds of each stage's actions for a micro-batch, of the parts that recompute and communicate, and of a hop."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: tuple[float, ...]
    recomputed: tuple[float, ...]
    collectives: tuple[float, ...]
    hop: float


def predict(job: Job, machine: Machine) -> Prediction:
    """One step of `job`."""
    layout, actions = job.layout, actions_of(job, machine)
    span = pipeline_seconds(job, actions)
    busy = busy_seconds(job, actions)
    rank = max(range(layout.pp), key=lambda r: busy[r])
    collectives = job.micros * sum(actions.collectives[s] for s in layout.stages_of(rank))
    tails = [tail(job, machine, rank, actions) for rank in range(layout.pp)]
    replicas, optimizer = max(tails, key=sum)
    overhead = machine.constants.step
    seconds = span + replicas + optimizer + overhead
    return Prediction(seconds, busy[rank] - collectives, collectives, span - busy[rank], replicas, optimizer, overhead)


def actions_of(job: Job, machine: Machine) -> Actions:
    """Seconds of the program's actions on each stage."""
    layout, block, layers = job.layout, block_seconds(job, machine), job.layers
    last, split = layout.stages - 1, layout.schedule == "zero-bubble"
    embedding, head = embedding_seconds(job, machine), head_seconds(job, machine)
    hop, edge = hop_seconds(job, machine), exchange_seconds(job, machine) / 2
    blocking = 0.0 if job.engine.overlap or layout.pp == 1 else hop
    forward, backward, weights = [], [], []
    for stage in range(layout.stages):
        there, back, matrices = (layers[stage] * x for x in (block.forward, block.inputs, block.weights))
        if stage == 0:
            there, back, matrices = there + embedding + edge, back + edge, matrices + 2 * embedding
        if stage == last:
            there, back, matrices = there + head[0] + edge, back + head[1] + edge, matrices + head[2]
        forward.append(there + blocking)
        backward.append(back + blocking + (0.0 if split else matrices))
        weights.append(matrices if split else 0.0)
    recomputed = tuple(n * block.recomputed for n in layers)
    edges = (2 * edge * ((stage == 0) + (stage == last)) for stage in range(layout.stages))
    collectives = tuple(n * block.collectives + more for n, more in zip(layers, edges, strict=True))
    return Actions(tuple(forward), tuple(backward), tuple(weights), recomputed, collectives, hop)


def busy_seconds(job: Job, actions: Actions) -> list[float]:
    """What each pipeline rank works in a step, waiting left out."""
    layout = job.layout
    return [
        job.micros * sum(actions.forward[s] + actions.backward[s] + actions.weights[s] for s in stages)
        for stages in map(layout.stages_of, range(layout.pp))
    ]


def least_seconds(job: Job, actions: Actions) -> float:
    """What the pipeline takes at least: a rank's work, the forwards before its first one, and, unless weight gradients
    are put off to the end, the backwards after its last one."""
    split, before, least = job.layout.schedule == "zero-bubble", 0.0, 0.0
    for rank, busy in enumerate(busy_seconds(job, actions)):
        least = max(least, before + busy)
        before += actions.forward[rank] + (0.0 if split else actions.backward[rank])
    return least


def hop_seconds(job: Job, machine: Machine) -> float:
    """A micro-batch's activations from one stage to the next, each tensor-parallel rank its part."""
    layout = job.layout
    size = job.tokens * job.shape.hidden * WIDTH[job.dtype] / layout.tp
    return machine.hop(size, layout.ranks <= machine.cluster.gpus_per_node) if layout.pp > 1 else 0.0


@lru_cache(maxsize=4096)
def program_of(schedule: str, pp: int, micros: int, vpp: int) -> Program:
    """The engine's program, made once."""
    return build(schedule, pp, micros, vpp)


def events_of(job: Job, actions: Actions, micros: int | None = None) -> list[Event]:
    """The simulated step up to its last backward."""
    layout = job.layout
    program = program_of(layout.schedule, layout.pp, micros or job.micros, layout.vpp)
    return simulate(program, cost_of(actions), actions.hop if job.engine.overlap else 0.0)


def cost_of(actions: Actions) -> Callable[[Action], float]:
    """Seconds of an action."""
    table = {"F": actions.forward, "B": actions.backward, "W": actions.weights}
    return lambda action: table[action.kind][action.stage]


def pipeline_seconds(job: Job, actions: Actions) -> float:
    """From the first forward to the last backward of a step.

    Long programs repeat themselves: beyond ROUNDS micro-batches for each pipeline rank the time grows evenly, so that
    two short ones tell a long one's; where they do not, as a bound shows, it is simulated. A rank's hops take turns.
    """
    pp, micros = job.layout.pp, job.micros
    if pp == 1:
        return micros * (sum(actions.forward) + sum(actions.backward) + sum(actions.weights))
    short = ROUNDS * pp + micros % pp
    sent = micros * max(hops_of(job)) * actions.hop if job.engine.overlap else 0.0
    if micros <= short + pp:
        return max(sent, _span(events_of(job, actions)))
    first, second = (_span(events_of(job, actions, count)) for count in (short, short + pp))
    told = first + (second - first) * (micros - short) / pp
    if told < (1 - 1e-9) * least_seconds(job, actions):
        told = _span(events_of(job, actions))
    return max(sent, told)


def hops_of(job: Job) -> list[int]:
    """What each pipeline rank sends to another rank for a micro-batch, forward and backward."""
    layout, last = job.layout, job.layout.stages - 1
    return [sum((stage < last) + (stage > 0) for stage in layout.stages_of(rank)) for rank in range(layout.pp)]


def _span(events: list[Event]) -> float:
    return max(event.end for event in events)


def tail(job: Job, machine: Machine, rank: int, actions: Actions) -> tuple[float, float]:
    """(communication of the replicas, update) of a pipeline rank that follow its last backward.

    With overlap, buckets of gradients are reduced as soon as they are complete, beside the rest of the last backwards;
    buckets of new weights are gathered beside the first forwards. The last bucket, and the first, hide behind nothing.
    """
    layout, engine = job.layout, job.engine
    stages = layout.stages_of(rank)
    held = sum(stage_parameters(job, stage) for stage in stages)
    group = machine.group(layout.dp, layout.tp)
    if not engine.sharded_optimizer:
        replicas, updated = 2 * machine.gathered(engine.gradient_bytes * held, group), float(held)
    else:
        buckets = -(-held // BUCKET_ELEMENTS)
        reduced = machine.gathered(engine.gradient_bytes * held, group, buckets)
        gathered = machine.gathered(WIDTH[job.dtype] * held, group, buckets)
        last = actions.weights if layout.schedule == "zero-bubble" else actions.backward
        replicas = _exposed(reduced, buckets, _beside(job, last, stages))
        replicas += _exposed(gathered, buckets, _beside(job, actions.forward, stages))
        updated = held / layout.dp
    return replicas, machine.moved(ADAM_BYTES[engine.sharded_optimizer] * updated)


def _exposed(seconds: float, buckets: int, beside: float) -> float:
    """Of communication in buckets, one of which always is, what does not fit beside so much compute."""
    return max(seconds / buckets, seconds - beside)


def _beside(job: Job, seconds: tuple[float, ...], stages: range) -> float:
    """Compute of a rank, whose chunks take so long for a micro-batch, between its first complete bucket and its last:
    all chunks but one have pp micro-batches at a time."""
    if not job.engine.overlap:
        return 0.0
    return seconds[stages[0]] + min(job.layout.pp, job.micros) * sum(seconds[stage] for stage in stages[1:])
