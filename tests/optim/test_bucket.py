"""Buckets: where each canonical element lies in the shards of every data-parallel rank, without any process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megallama.optim.bucket import ALIGN, Bucket, Held, Range
from megallama.parallel.pieces import Piece, Rect, shard, whole
from megallama.runtime.mesh import sketch

SHAPES = [(7, 5), (13,), (3, 64), (1, 1), (129,)]


def code(name: str, rect: Rect) -> Tensor:
    """A number for every element of a canonical rectangle that tells its tensor, row and column."""
    rows = torch.arange(rect.r0, rect.r1, dtype=torch.float64)[:, None]
    return int(name) * 1e6 + rows * 1e3 + torch.arange(rect.c0, rect.c1) + 1


def held(shapes: list[tuple[int, ...]]) -> list[Held]:
    """Fresh parameters that each hold one whole canonical tensor, named by its number."""
    return [
        Held(nn.Parameter(torch.zeros(shape, dtype=torch.float64)), [whole(str(n), shape)])
        for n, shape in enumerate(shapes)
    ]


def joined(parameters, dp: int, tp: tuple[int, int] = (0, 1)) -> tuple[list[Tensor], list[Bucket]]:
    """The local parameters that all shards' slots, filled with codes, make up; and every rank's bucket.

    Args:
        parameters: makes fresh ones.
        tp: rank and size of the tensor-parallel axis.
    """
    rank, size = tp
    buckets = [Bucket(parameters(), sketch(d * size + rank, dp * size, size, 1, 1, False)) for d in range(dp)]
    for bucket in buckets:
        for slot in bucket.slots:
            slot.view(bucket.master).copy_(code(slot.name, slot.rect))
    flat, values, at = torch.cat([bucket.master for bucket in buckets]), [], 0
    for weight, _ in parameters():
        values.append(flat[at : at + weight.numel()].view_as(weight))
        at += weight.numel()
    assert not flat[at:].any(), "the bucket's own padding lies in no slot"
    return values, buckets


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_shards_make_up_the_parameters(dp: int) -> None:
    values, buckets = joined(lambda: held(SHAPES), dp)
    for n, (shape, value) in enumerate(zip(SHAPES, values, strict=True)):
        assert torch.equal(value, code(str(n), _rect(shape)).view(shape))
    numel = sum(math.prod(shape) for shape in SHAPES)
    assert {bucket.size for bucket in buckets} == {-(-numel // (dp * ALIGN)) * ALIGN}


def _rect(shape: tuple[int, ...]) -> Rect:
    return Rect(0, 1, 0, shape[0]) if len(shape) == 1 else Rect(0, shape[0], 0, shape[1])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 20), st.integers(1, 30))), min_size=1),
    st.integers(1, 4),
)
def test_shards_make_up_any_parameters(shapes: list[tuple[int, ...]], dp: int) -> None:
    values, buckets = joined(lambda: held(shapes), dp)
    for n, (shape, value) in enumerate(zip(shapes, values, strict=True)):
        assert torch.equal(value, code(str(n), _rect(shape)).view(shape))
    elements = sum(math.prod(shape) for shape in shapes)
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    assert sum(hi - lo for bucket in buckets for lo, hi in bucket.owned) == elements
    assert sum(hi - lo for bucket in buckets for lo, hi in bucket.decayed) == matrices


def fused(tp_rank: int) -> list[Held]:
    """On two tensor-parallel ranks: a fused weight of two tensors, a replicated norm, and a padded vocabulary."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    first = shard("0", (8, 6), 0, tp_rank, 2)
    second = shard("1", (4, 6), 0, tp_rank, 2)._replace(at=(4, 0))
    copied = Piece("2", (2, 6), Rect(0, 2, 0, 6), (6, 0), "kv", True)
    return [
        Held(parameter(8, 6), [first, second, copied]),
        Held(parameter(6), [whole("3", (6,), "tp", partial=True)]),
        Held(parameter(3, 6), [shard("4", (5, 6), 0, tp_rank, 2)]),
    ]


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_fused_replicated_and_padded_parameters(dp: int, tp_rank: int) -> None:
    (weight, norm, vocabulary), buckets = joined(lambda: fused(tp_rank), dp, (tp_rank, 2))
    expected = [
        code("0", Rect(4 * tp_rank, 4 * tp_rank + 4, 0, 6)),
        code("1", Rect(2 * tp_rank, 2 * tp_rank + 2, 0, 6)),
    ]
    assert torch.equal(weight, torch.cat([*expected, code("2", Rect(0, 2, 0, 6))]))
    assert torch.equal(norm, code("3", Rect(0, 1, 0, 6))[0])
    rows = 3 - tp_rank  # the sixth row of the vocabulary is padding
    assert torch.equal(vocabulary[:rows], code("4", Rect(3 * tp_rank, 3 * tp_rank + rows, 0, 6)))
    assert not vocabulary[rows:].any()
    # Sharded: 4 + 2 rows and the vocabulary's; copies of K/V and of the norm count on their first rank alone.
    owned = sum(hi - lo for bucket in buckets for lo, hi in bucket.owned)
    assert owned == (6 + rows) * 6 + (0 if tp_rank else 2 * 6 + 6)
    assert sum(hi - lo for bucket in buckets for lo, hi in bucket.decayed) == (8 + rows) * 6


def test_parameters_and_gradients_are_views_of_flat_memory() -> None:
    bucket = Bucket(held(SHAPES), sketch(0, 1, 1, 1, 1, False))
    for (weight, _), grad in zip(bucket.held, bucket.buffers(), strict=True):
        weight.data.fill_(2)
        grad.fill_(3)
    numel = sum(math.prod(shape) for shape in SHAPES)
    assert (bucket.weights[:numel] == 2).all() and (bucket.grads[:numel] == 3).all()
    assert bucket.master.data_ptr() == bucket.weights.data_ptr(), "fp64 weights are their own masters"


def test_ranges_join() -> None:
    """Neighbouring matrices are decayed by one call; a norm between them parts the ranges."""
    bucket = Bucket(held([(4, 4), (2, 8), (5,), (3, 3)]), sketch(0, 1, 1, 1, 1, False))
    assert bucket.decayed == [Range(0, 32), Range(37, 46)]
    assert bucket.owned == [Range(0, 46)]


def test_bf16_has_wide_masters_and_gradients() -> None:
    weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    bucket = Bucket([Held(weight, [whole("0", (3, 5))])], sketch(0, 1, 1, 1, 1, False))
    states = (bucket.master, bucket.exp_avg, bucket.exp_avg_sq, bucket.grads)
    assert {state.dtype for state in states} == {torch.float32}
    bucket.master.fill_(1 + 2**-9)  # half an ulp above one
    bucket.publish()
    bucket.ready()
    assert weight.dtype == torch.bfloat16 and (weight == 1).all()
