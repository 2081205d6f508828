"""The schedules: pure functions from sizes to compute-only programs. Stage c * ranks + r is chunk c of rank r.

Bubbles below are shares of the step for stages of equal cost and free transfers; p ranks, m micro-batches, v chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from megallama.pipeline.program import Action, Program


def gpipe(ranks: int, micros: int) -> Program:
    """All forwards, then all backwards (Huang et al. 2019). Bubble (p-1)/(m+p-1); a rank holds m activations."""
    return [[Action(kind, rank, micro) for kind in "FB" for micro in range(micros)] for rank in range(ranks)]


def one_f_one_b(ranks: int, micros: int) -> Program:
    """One forward, one backward (PipeDream-Flush, Narayanan et al. 2021): GPipe's bubble, min(m, p-r) activations."""
    return [
        _alternate(
            [Action("F", rank, micro) for micro in range(micros)],
            [Action("B", rank, micro) for micro in range(micros)],
            warmup=ranks - rank - 1,
        )
        for rank in range(ranks)
    ]


def interleaved(ranks: int, micros: int, chunks: int) -> Program:
    """1F1B over several chunks of the model a rank (Narayanan et al. 2021, section 2.2). Bubble (p-1)/(v*m+p-1).

    Rank r holds up to min(m*v, 2*(p-r-1) + (v-1)*p + 1) activations, each of one chunk. With one chunk this is 1F1B.

    Raises:
        ValueError: more than one chunk and `micros` not divisible by `ranks`.
    """
    if chunks == 1:
        return one_f_one_b(ranks, micros)
    if micros % ranks:
        below, above = micros - micros % ranks, micros - micros % ranks + ranks
        raise ValueError(
            f"the interleaved schedule needs the micro-batches of a step ({micros}) divisible by parallel.pp={ranks}; "
            f"change train.global_batch_size or train.micro_batch_size to get {f'{below} or ' if below else ''}{above} "
            f"(micro-batches = global_batch_size / micro_batch_size / data-parallel ranks), "
            f"or set parallel.schedule=1f1b and parallel.vpp=1"
        )
    return [
        _alternate(
            _chunked("F", rank, ranks, micros, range(chunks)),
            _chunked("B", rank, ranks, micros, range(chunks)[::-1]),
            warmup=2 * (ranks - rank - 1) + (chunks - 1) * ranks,
        )
        for rank in range(ranks)
    ]


def zero_bubble(ranks: int, micros: int) -> Program:
    """ZB-H1 (Qi et al. 2024): 1F1B whose weight gradients are put off into what would be the bubble.

    Rank r lets r weight gradients wait, so that no rank holds more than 1F1B's first: min(m, p-r) whole activations,
    and what the waiting weight gradients read of at most r more. For m >= p a rank idles (p-1) * (F + B - W) a step,
    each letter the time of its kind, W <= F, where 1F1B's idles (p-1) * (F + B + W). With F = B = W the bubble is
    (p-1)/(3m+p-1), about a third of 1F1B's.
    """
    return [_put_off_weights(row, delay=rank) for rank, row in enumerate(one_f_one_b(ranks, micros))]


def forward_only(ranks: int, micros: int, chunks: int = 1) -> Program:
    """Forwards alone, for evaluation and generation, in interleaving's order; any number of micro-batches."""
    return [_chunked("F", rank, ranks, micros, range(chunks)) for rank in range(ranks)]


def build(name: str, ranks: int, micros: int, chunks: int = 1) -> Program:
    """The training program of `parallel.schedule` = `name`.

    Args:
        name: a key of SCHEDULES.
        ranks: pipeline ranks, parallel.pp.
        micros: micro-batches of a step on each data-parallel rank.
        chunks: model chunks a rank, parallel.vpp.

    Raises:
        ValueError: the sizes do not fit the schedule; the message names the options to change.
    """
    if name not in SCHEDULES:
        raise ValueError(f"parallel.schedule={name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    for option, value in (("parallel.pp", ranks), ("micro-batches a step", micros), ("parallel.vpp", chunks)):
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    if chunks > 1 and ranks == 1:
        raise ValueError(f"parallel.vpp={chunks} needs pipeline ranks, but parallel.pp=1; set parallel.vpp=1")
    return SCHEDULES[name](ranks, micros, chunks)


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    row = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        row += (forward, backward)
    return row + backwards[len(forwards) - warmup :]


def _chunked(kind: str, rank: int, ranks: int, micros: int, chunks: range) -> list[Action]:
    """Micro-batches go in groups of `ranks`; a group passes all chunks before the next group starts."""
    return [
        Action(kind, chunk * ranks + rank, micro)
        for first in range(0, micros, ranks)
        for chunk in chunks
        for micro in range(first, min(first + ranks, micros))
    ]


def _put_off_weights(row: list[Action], delay: int) -> list[Action]:
    """Split every B into B and W; a W comes when `delay` younger ones wait, and those left come last."""
    backwards = [action for action in row if action.kind == "B"]
    weights = [Action("W", action.stage, action.micro) for action in backwards]
    due = dict(zip(backwards[delay:], weights, strict=False))  # B -> the W that follows it
    split: list[Action] = []
    for action in row:
        split.append(action)
        if action in due:
            split.append(due[action])
    return split + weights[len(due) :]


def _one_chunk(name: str, generate: Callable[[int, int], Program]) -> Callable[[int, int, int], Program]:
    """Give a schedule without chunks the table's signature."""

    def one_chunk(ranks: int, micros: int, chunks: int) -> Program:
        if chunks > 1:
            raise ValueError(
                f"parallel.schedule={name} runs one chunk a rank, but parallel.vpp={chunks}; "
                f"set parallel.vpp=1 or parallel.schedule=interleaved"
            )
        return generate(ranks, micros)

    return one_chunk


SCHEDULES: dict[str, Callable[[int, int, int], Program]] = {
    "gpipe": _one_chunk("gpipe", gpipe),
    "1f1b": _one_chunk("1f1b", one_f_one_b),
    "interleaved": interleaved,
    "zero-bubble": _one_chunk("zero-bubble", zero_bubble),
}
