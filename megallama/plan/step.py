"""The time of one training step: the engine's own program with the seconds of its actions, and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from megallama.pipeline import Action, Event, Program, build, simulate
from megallama.plan.job import WIDTH, Job
from megallama.plan.machine import Machine
from megallama.plan.work import block_seconds, embedding_seconds, head_seconds, stage_parameters

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
    collectives = job.micros * sum(actions.collectives[s] for s in range(rank, layout.stages, layout.pp))
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
    hop = hop_seconds(job, machine)
    blocking = 0.0 if job.engine.overlap or layout.pp == 1 else hop
    forward, backward, weights = [], [], []
    for stage in range(layout.stages):
        there, back, matrices = (layers[stage] * x for x in (block.forward, block.inputs, block.weights))
        if stage == 0:
            there, matrices = there + embedding, matrices + 2 * embedding
        if stage == last:
            there, back, matrices = there + head[0], back + head[1], matrices + head[2]
        forward.append(there + blocking)
        backward.append(back + blocking + (0.0 if split else matrices))
        weights.append(matrices if split else 0.0)
    recomputed, collectives = (tuple(n * part for n in layers) for part in (block.recomputed, block.collectives))
    return Actions(tuple(forward), tuple(backward), tuple(weights), recomputed, collectives, hop)


def busy_seconds(job: Job, actions: Actions) -> list[float]:
    """What each pipeline rank works in a step, waiting left out."""
    layout = job.layout
    return [
        job.micros * sum(actions.forward[s] + actions.backward[s] + actions.weights[s] for s in stages)
        for stages in (range(rank, layout.stages, layout.pp) for rank in range(layout.pp))
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
    within = layout.ranks <= machine.cluster.gpus_per_node or layout.tp * layout.dp * 2 <= machine.cluster.gpus_per_node
    return machine.hop(size, within) if layout.pp > 1 else 0.0


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
    two short ones tell a long one's.
    """
    pp, micros = job.layout.pp, job.micros
    if pp == 1:
        return micros * (sum(actions.forward) + sum(actions.backward) + sum(actions.weights))
    short = ROUNDS * pp + micros % pp
    if micros <= short + pp:
        return _span(events_of(job, actions))
    first, second = (_span(events_of(job, actions, count)) for count in (short, short + pp))
    return first + (second - first) * (micros - short) / pp


def _span(events: list[Event]) -> float:
    return max(event.end for event in events)


def tail(job: Job, machine: Machine, rank: int, actions: Actions) -> tuple[float, float]:
    """(communication of the replicas, update) of a pipeline rank that follow its last backward.

    With overlap, gradients of all chunks but the last one to end are reduced beside compute, and the gather of new
    weights runs beside the first forward.
    """
    layout = job.layout
    stages = range(rank, layout.stages, layout.pp)
    counts = [stage_parameters(job, stage) for stage in stages]
    group = machine.group(layout.dp, layout.tp)
    held = sum(counts)
    if job.engine.sharded_optimizer:
        reduced = machine.gathered(job.engine.gradient_bytes * (counts[0] if job.engine.overlap else held), group)
        gathered = machine.gathered(WIDTH[job.dtype] * held, group)
        hidden = actions.forward[stages[0]] if job.engine.overlap else 0.0
        replicas, updated = reduced + max(0.0, gathered - hidden), held / layout.dp
    else:
        replicas, updated = 2 * machine.gathered(job.engine.gradient_bytes * held, group), float(held)
    return replicas, machine.moved(ADAM_BYTES[job.engine.sharded_optimizer] * updated)
