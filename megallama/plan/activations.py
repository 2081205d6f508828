"""Bytes that one micro-batch keeps and needs on one rank of a stage, tensor by tensor.

This engine is described as it runs on a GPU: a flash attention kernel, segments that are not compiled, documents not
masked, weight gradients of bfloat16 made in float32. Other engines keep what Korthikanti et al. 2022 count.

Letters: T tokens of a micro-batch, h hidden, f intermediate, k heads of keys times their width, V vocabulary, t tp.
"""

from __future__ import annotations

from typing import NamedTuple

from megallama.plan.job import WIDTH, Job

CHUNK_BYTES = 1 << 28
"""Of logits in float32 that the loss works on at a time (parallel/loss.py)."""

NORM_BACKWARD = 5
"""Wide rows that a norm's backward makes and holds at once."""

GATE_UP = 2
"""Matrices of this engine's first projection of the feed-forward."""


class Bytes(NamedTuple):
    """Parts of what a step holds beside the persistent state; as a difference, a part may be negative."""

    activations: int = 0
    logits: int = 0
    buffers: int = 0

    def plus(self, other: Bytes, times: int = 1) -> Bytes:
        return Bytes(*(a + times * b for a, b in zip(self, other, strict=True)))


class Tensors(NamedTuple):
    """Bytes on a rank of the tensors that a micro-batch is made of, in the compute type unless wide.

    Attributes:
        row: hidden states between the matrices (T/t, h).
        wide_row: the same in at least float32.
        gathered: (T, h) where a gather makes it, 0 where there is nothing to gather.
        query: (T, h/t), as large as attention's output.
        keys: (T, k), as large as the values.
        ffn: (T, f/t).
        logits: (T, V/t).
        turn: sines and cosines (T, head width), wide; GPT's kin has none.
        scale: a norm's root mean square (T/t), wide.
        statistics: attention's log-sum-exp (T, heads/t) in float32.
        scores: (samples, heads/t, sequence, sequence), counted in numbers.
    """

    row: int
    wide_row: int
    gathered: int
    query: int
    keys: int
    ffn: int
    logits: int
    turn: int
    scale: int
    statistics: int
    scores: int


def tensors_of(job: Job) -> Tensors:
    """The sizes that all of this file is made of."""
    s, tp, tokens, width = job.shape, job.layout.tp, job.tokens, WIDTH[job.dtype]
    wide, split = max(width, 4), tp if job.layout.sequence_parallel else 1
    rows = -(-tokens // split)
    return Tensors(
        row=rows * s.hidden * width,
        wide_row=rows * s.hidden * wide,
        gathered=tokens * s.hidden * width if split > 1 else 0,
        query=tokens * s.hidden * width // tp,
        keys=tokens * max(s.kv_heads // tp, 1) * s.head_dim * width,
        ffn=tokens * s.intermediate * width // tp,
        logits=0 if s.scalar else tokens * -(-s.vocab // tp) * width,
        turn=tokens * s.head_dim * wide if s.gated else 0,
        scale=rows * wide,
        statistics=4 * tokens * s.heads // tp,
        scores=tokens * job.seq_length * s.heads // tp,
    )


def kept_bytes(job: Job, recompute: str) -> int:
    """Bytes that one block keeps from its forward to its backward with `recompute`.

    This engine: of both norms the wide input, its root mean square, the normalised rows and the result; of attention
    q, k and v (a view, which keeps what q and k were turned from), the turned q and k, the output and its statistics;
    of the feed-forward [gate, up], silu(gate) and the product. Recomputing the core drops the turned q and k and the
    statistics; full recomputation keeps the block's input alone.

    Others: both norms' inputs and results, q, k, v, the output and the feed-forward's, and without recomputation of the
    core the softmax (Korthikanti et al. 2022, section 4). GPT's dropout adds masks and what they were applied to.
    """
    x = tensors_of(job)
    if recompute == "full":
        return x.row
    qkv = x.query + 2 * x.keys
    if job.engine.fused_attention:
        norms = 2 * (x.wide_row + x.scale + 2 * x.row)
        core = x.query + x.keys + x.statistics if recompute == "none" else 0
        return norms + qkv + core + x.query + 4 * x.ffn
    width, dropout = WIDTH[job.dtype], not job.shape.gated
    masks = 2 * x.row // width if dropout else 0
    core = x.scores * (2 * width + 1 if dropout else width) if recompute == "none" else 0
    return 4 * x.row + masks + qkv + core + x.query + job.shape.feed_forwards * x.ffn


def waiting_bytes(job: Job) -> int:
    """Bytes that one block's put-off weight gradients read: x and dy of its four products.

    A row-parallel matrix reads the gathered dy: (T, h) on every rank.
    """
    x = tensors_of(job)
    columns = 2 * x.row + x.query + 2 * x.keys + (job.shape.feed_forwards - 1) * x.ffn
    return columns + x.query + x.ffn + 2 * (x.gathered or x.row)


class StageBytes(NamedTuple):
    """One stage's bytes for one micro-batch.

    Attributes:
        held: from F to B.
        waiting: from B to W.
        reduced: this rank's shard of the gradients, from their reduction to the end of the step.
        extra: (kind of action, whether it is the stage's last contribution) -> the most that lives beside what is held
            when the action starts (B, W) or ends (F, G).
    """

    held: Bytes
    waiting: Bytes
    reduced: Bytes
    extra: dict[tuple[str, bool], Bytes]


def stage_bytes(job: Job, stage: int, shard: Bytes, early: Bytes) -> StageBytes:
    """The bytes of a stage.

    Args:
        shard: the stage's reduced gradients on one rank.
        early: the part of them that comes before the first block's gradients do.
    """
    x, layers, kept = tensors_of(job), job.layers[stage], kept_bytes(job, job.layout.recompute)
    put_off, last = deferred(job), stage == job.layout.stages - 1
    head = _head(job) if last else _Head()
    # The first norm's wide input, or what is kept to recompute a block, is the stage's input itself, unless it is cast.
    shared = layers and (job.layout.recompute == "full" or x.wide_row == x.row)
    held = Bytes(layers * kept + (x.turn if layers else 0) + (x.row if stage and not shared else 0)).plus(head.held)
    top: list[Bytes] = []  # moments of the last block's backward, against the start of the stage's
    bottom: list[Bytes] = []  # of the first block's, which comes last
    if layers:
        behind = Bytes(-kept).plus(head.held, -1)
        # The engine holds the next stage's gradient to the end of B; a put-off product may be what reads it anyway.
        handed = 0 if last or layers == 1 or (put_off and not x.gathered) else x.row
        above = Bytes((layers - 1) * ((waiting_bytes(job) if put_off else 0) - kept) + handed)
        top = [moment.plus(behind).plus(head.waiting, put_off) for moment in _block_moments(job)]
        bottom = [moment.plus(above) for moment in top]
    gate_up = Bytes(buffers=x.gathered + _product(job, GATE_UP * job.shape.intermediate // job.layout.tp))
    qkv = Bytes(buffers=x.gathered + _product(job, (x.query + 2 * x.keys) // (job.tokens * WIDTH[job.dtype])))
    first = Bytes(buffers=x.gathered + head.product)
    extra = {
        ("F", False): head.forward,
        ("B", False): max(Bytes(), *head.backward, *top, *bottom, key=sum),
        ("B", True): max(Bytes(), *head.backward, *top, *(moment.plus(early) for moment in bottom), key=sum),
        ("W", False): max(first, gate_up, key=sum),
        ("W", True): max(first, gate_up.plus(early), qkv.plus(shard), key=sum),
        ("G", False): Bytes(),
    }
    return StageBytes(held, Bytes(layers * waiting_bytes(job)).plus(head.waiting), shard, extra)


class _Head(NamedTuple):
    """The final norm, the head and the loss, which works in the memory of the logits; nothing on other stages.

    Attributes:
        held, waiting: as StageBytes's.
        product: the weight gradient on its way into its buffer.
        forward: what the loss adds.
        backward: what the loss, the head's products and then the norm add.
    """

    held: Bytes = Bytes()
    waiting: Bytes = Bytes()
    product: int = 0
    forward: Bytes = Bytes()
    backward: tuple[Bytes, ...] = ()


def _head(job: Job) -> _Head:
    x, width = tensors_of(job), WIDTH[job.dtype]
    if not job.engine.fused_attention:
        return _Head(Bytes(2 * x.row, x.logits // width * max(width, 4)))
    norm = x.wide_row + x.scale + 2 * x.row
    last = Bytes(NORM_BACKWARD * x.wide_row - x.row)  # its two other rows are freed, its gradient is there
    if job.shape.scalar:
        cast = x.wide_row if x.wide_row > x.row else 0
        return _Head(Bytes(norm + cast), backward=(last.plus(Bytes(-cast)),))
    product = _product(job, -(-job.shape.vocab // job.layout.tp))
    chunk = Bytes(logits=min(CHUNK_BYTES, x.logits // width * 4) if width < 4 else 0)
    products = x.gathered if deferred(job) else 2 * x.gathered + product
    waiting = Bytes(x.row, x.logits)
    return _Head(
        held=Bytes(norm, x.logits),
        waiting=waiting,
        product=product,
        forward=chunk,
        backward=(chunk, Bytes(x.row, 0, products), last.plus(Bytes(0, -x.logits)).plus(waiting, deferred(job))),
    )


def _block_moments(job: Job) -> list[Bytes]:
    """What lives of one block at the moments of its backward that can be the largest, what it recomputes included.

    1. The down projection has made its input's gradient, and the weight's is on its way into the buffer.
    2. Of that the gradients of silu(gate) and up have been made.
    3. The gate and up projection has made its input's gradient, and the weight's is on its way.
    4. The second norm is at work.

    What products that are put off read is not freed.
    """
    x, s, tp, recompute = tensors_of(job), job.shape, job.layout.tp, job.layout.recompute
    if not job.engine.fused_attention:
        return [Bytes(kept_bytes(job, "none"))]
    kept = kept_bytes(job, "selective" if recompute == "selective" else "none")
    if recompute == "full" and x.wide_row > x.row:
        kept += x.row  # the block's input, of which the first norm has made a wide copy
    if deferred(job):
        late = kept + x.row + x.ffn + x.gathered
        return [
            Bytes(late),
            Bytes(late + 2 * x.ffn),
            Bytes(late + x.row - 2 * x.ffn, 0, x.gathered),
            Bytes(late - 2 * x.ffn + NORM_BACKWARD * x.wide_row),
        ]
    down, gate_up = _product(job, s.intermediate // tp), _product(job, GATE_UP * s.intermediate // tp)
    return [
        Bytes(kept + x.row + x.ffn, 0, x.gathered + down),
        Bytes(kept + x.row + 2 * x.ffn),
        Bytes(kept + 2 * x.row - 2 * x.ffn, 0, 2 * x.gathered + gate_up),
        Bytes(kept - 4 * x.ffn + NORM_BACKWARD * x.wide_row),
    ]


def _product(job: Job, rows: int) -> int:
    """Of a weight gradient (rows, h) before it is added to its buffer: a GPU makes bfloat16's product in float32."""
    return rows * job.shape.hidden * 4 if WIDTH[job.dtype] < 4 and job.engine.fused_attention else 0


def deferred(job: Job) -> bool:
    """Whether weight gradients are put off to actions of their own."""
    return job.layout.schedule == "zero-bubble"
