"""Seconds of a stage's actions, from the kernels and collectives of its blocks, its embedding and its head."""

from __future__ import annotations

from typing import NamedTuple

from megallama.plan.job import WIDTH, Job
from megallama.plan.machine import Machine

ATTENTION, ATTENTION_BACKWARD = 0.7, 0.6
"""Speed of attention kernels, forward and backward, against large matrix products."""
SCORE_PASSES = 7
"""How often kernels that do not fuse attention read or write a score: scaled, masked, softmax, dropout, products."""
BACKWARD_KERNELS = 1.5
"""Kernels of a block's backward against its forward's."""
LOGIT_BYTES = 16
"""Of a logit, over forward and backward of the cross-entropy in float32."""


class BlockSeconds(NamedTuple):
    """One micro-batch through one block on one rank.

    Attributes:
        forward: all of it; it may wait for the host.
        inputs: backward to the block's input, recomputation included.
        weights: backward to its weights.
        recomputed: the part of `inputs` that repeats the forward.
        collectives: the part of the tensor-parallel ranks' communication in forward, inputs and weights.
    """

    forward: float
    inputs: float
    weights: float
    recomputed: float
    collectives: float


def block_seconds(job: Job, machine: Machine) -> BlockSeconds:
    """Of one transformer block."""
    products = _matrices(job)
    forward = sum(machine.matmul(m, n, k) for m, n, k in products)
    inputs = sum(machine.matmul(m, k, n) for m, n, k in products)
    weights = sum(machine.matmul(n, k, m) for m, n, k in products)
    core, core_back = attention_seconds(job, machine)
    moved = machine.moved(elementwise_bytes(job))
    exchange = 2 * exchange_seconds(job, machine)
    beside, later = regathered_seconds(job, machine)
    weights += later + accumulation_seconds(job, machine, block_parameters(job))
    there = machine.launched(forward + core + moved + exchange)
    back = machine.launched(inputs + weights + core_back + 1.5 * moved + exchange + beside, BACKWARD_KERNELS)
    again = {"none": 0.0, "selective": core, "full": there}[job.layout.recompute]
    collectives = (3 if job.layout.recompute == "full" else 2) * exchange + beside + later
    return BlockSeconds(there, back - weights + again, weights, again, collectives)


def _matrices(job: Job) -> list[tuple[int, int, int]]:
    """(m, n, k) of a block's matrix products: (m, k) times (k, n)."""
    s, tp, tokens = job.shape, job.layout.tp, job.tokens
    query, kv, width = s.hidden // tp, max(s.kv_heads // tp, 1) * s.head_dim, s.intermediate // tp
    return [
        (tokens, query + 2 * kv, s.hidden),
        (tokens, s.hidden, query),
        (tokens, (s.feed_forwards - 1) * width, s.hidden),
        (tokens, s.hidden, width),
    ]


def attention_seconds(job: Job, machine: Machine) -> tuple[float, float]:
    """(forward, backward) of the attention core: both products with the scores, and what lies between them."""
    s, samples = job.shape, job.layout.micro_batch
    heads = max(1, s.heads // job.layout.tp)
    scores = samples * heads * job.seq_length**2
    flops = 2 * 2 * scores * s.head_dim
    if job.engine.fused_attention:  # causal: half of the scores; backward computes them again
        forward, backward = flops / 2, 2.5 * flops / 2
        return forward / (machine.flops * ATTENTION), backward / (machine.flops * ATTENTION_BACKWARD)
    passes = machine.moved(SCORE_PASSES * scores * WIDTH[job.dtype])
    return flops / (machine.flops * ATTENTION_BACKWARD) + passes, 2 * flops / (
        machine.flops * ATTENTION_BACKWARD
    ) + passes


def elementwise_bytes(job: Job) -> float:
    """Read and written by a block's forward outside of its products: norms, residuals, positions, activation.

    Numbers a token: both norms read and write `hidden`, both residual sums read two and write one; queries, keys and
    values are turned and laid out anew; the activation reads what the first matrices give and writes one. Without fused
    kernels every step of `model.segments` reads and writes, many of them in float32, which counts as two: a norm 18 for
    each number, a rotation 19 for each of queries and keys, silu and product 5.
    """
    s, layout = job.shape, job.layout
    keys, fused = s.kv_heads * s.head_dim, job.engine.fused_kernels
    norms = 4 if fused else 36
    turned = 2 * (s.hidden + 2 * keys) if fused else 19 * (s.hidden + keys)
    activated = (3 if s.gated else 2) * s.intermediate if fused else 5 * s.intermediate
    whole = (norms + 6) * s.hidden / (layout.tp if layout.sequence_parallel else 1)
    return job.tokens * WIDTH[job.dtype] * (whole + (turned + activated) / layout.tp)


def exchange_seconds(job: Job, machine: Machine) -> float:
    """What tensor-parallel ranks exchange around attention or feed-forward, once: a gather and a reduce-scatter, or
    the all-reduce that is both."""
    size = job.tokens * job.shape.hidden * WIDTH[job.dtype]
    return 2 * machine.gathered(size, machine.group(job.layout.tp, 1))


def regathered_seconds(job: Job, machine: Machine) -> tuple[float, float]:
    """(what the gradient to the inputs does not hide, with the gradient to the weights) of a block's second gathers.

    Only each rank's part of what the column-parallel layers multiply is kept for the backward. It is gathered again
    while the gradient to it is computed, or, where weight gradients come later, right before they do.
    """
    layout = job.layout
    if layout.tp == 1 or not layout.sequence_parallel:
        return 0.0, 0.0
    size = job.tokens * job.shape.hidden * WIDTH[job.dtype]
    gather = machine.gathered(size, machine.group(layout.tp, 1))
    if layout.schedule == "zero-bubble":
        return 0.0, 2 * gather
    return sum(max(0.0, gather - machine.matmul(m, k, n)) for m, n, k in _matrices(job)[::2]), 0.0


def accumulation_seconds(job: Job, machine: Machine, parameters: int) -> float:
    """Adding a micro-batch's gradients to those of earlier ones: both are read, and the sum is written."""
    return 0.0 if job.engine.fused_accumulation else machine.moved(3 * job.engine.gradient_bytes * parameters)


def head_seconds(job: Job, machine: Machine) -> tuple[float, float, float]:
    """(forward, backward to the input, backward to the weights) of the last stage's head and loss."""
    columns = 1 if job.shape.scalar else -(-job.shape.vocab // job.layout.tp)
    m, n, k = job.tokens, columns, job.shape.hidden
    loss = machine.moved(LOGIT_BYTES * m * n) / 2
    weights = machine.matmul(n, k, m) + accumulation_seconds(job, machine, n * k)
    return machine.matmul(m, n, k) + loss, machine.matmul(m, k, n) + loss, weights


def embedding_seconds(job: Job, machine: Machine) -> float:
    """Forward of the first stage's lookup; its backward is twice that."""
    return machine.moved(3 * job.tokens * job.shape.hidden * WIDTH[job.dtype])


def block_parameters(job: Job) -> int:
    """Of one block on one rank: matrices are split over tp, K/V heads copied where tp exceeds them, norms whole."""
    s, tp = job.shape, job.layout.tp
    kv = max(s.kv_heads // tp, 1) * s.head_dim
    return s.hidden * (2 * (s.hidden // tp) + 2 * kv + s.feed_forwards * (s.intermediate // tp)) + 2 * s.hidden


def stage_parameters(job: Job, stage: int) -> int:
    """Of one stage on one rank."""
    s, layout = job.shape, job.layout
    table = -(-s.vocab // layout.tp) * s.hidden
    count = job.layers[stage] * block_parameters(job)
    if stage == 0:
        count += table
    if stage == layout.stages - 1:
        head = s.hidden if s.scalar else table
        count += s.hidden + (0 if s.tied and stage == 0 else head)
    return count


def tflops(job: Job, seconds: float) -> float:
    """Model TFLOP/s of a GPU in steps of so many seconds."""
    return model_flops(job) / seconds / job.layout.ranks / 1e12


def model_flops(job: Job) -> int:
    """Of a whole step, by the conventions of `cost`: three forwards, attention in full, no recomputation."""
    s = job.shape
    kv = s.kv_heads * s.head_dim
    weights = s.hidden * (2 * s.hidden + 2 * kv + s.feed_forwards * s.intermediate)
    block = 2 * weights + 4 * job.seq_length * s.hidden
    head = 2 * s.hidden * (1 if s.scalar else s.vocab)
    return 3 * (s.layers * block + head) * job.global_batch * job.seq_length
