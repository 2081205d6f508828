"""Attention against softmax written out, head by head, and the rotary turn against complex numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megallama.model.attention import attention, runs
from megallama.model.rope import rotate, rotation

BOUNDS = {
    "one document": (0, 17),
    "unequal": (0, 5, 6, 13, 17),
    "equal runs": (0, 4, 8, 12, 15, 18, 19),
    "single tokens": (0, 1, 2, 3),
}


def naive(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """One query head after the other over the whole sequence, with everything forbidden at minus infinity."""
    tokens, heads, head_dim = q.shape
    document = torch.zeros(tokens, dtype=torch.int64)
    for number, (lo, hi) in enumerate(pairwise(bounds)):
        document[lo:hi] = number
    allowed = (document[:, None] == document[None]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    group = heads // k.shape[1]
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(head_dim)
        out.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[:, head // group])
    return torch.cat(out, 1)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_outputs_and_gradients_equal_written_out_softmax(bounds: tuple[int, ...], heads: int, kv_heads: int) -> None:
    random = torch.Generator().manual_seed(heads)
    shapes = [(bounds[-1], h, 6) for h in (heads, kv_heads, kv_heads)]
    ours = [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    got, expected = attention(*ours, bounds), naive(*theirs, bounds)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(got.shape, generator=random, dtype=torch.float64)
    got.backward(upstream)
    expected.backward(upstream)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-12, atol=1e-12)


def test_runs_cover_the_tokens_in_order() -> None:
    assert list(runs((0, 4, 8, 12, 15, 18, 19))) == [(0, 3, 4), (12, 2, 3), (18, 1, 1)]


def test_rotation_is_a_complex_product() -> None:
    """Element i and element i + head_dim/2 are one complex number, turned by position * theta^(-2i / head_dim)."""
    positions, head_dim, theta = torch.tensor([0, 1, 7, 4095]), 8, 500.0
    x = torch.randn(4, 3, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = rotate(x, rotation(positions, head_dim, theta, torch.float64))
    for t, position in enumerate(positions.tolist()):
        for i in range(head_dim // 2):
            angle = position * theta ** (-2 * i / head_dim)
            for head in range(3):
                turned = complex(x[t, head, i], x[t, head, i + 4]) * complex(math.cos(angle), math.sin(angle))
                assert abs(complex(y[t, head, i], y[t, head, i + 4]) - turned) < 1e-12


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(at: int, behind: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([p]), 8, 1e4, torch.float64)) for x, p in ((q, at), (k, behind))]
        return float((turned[0] * turned[1]).sum())

    assert math.isclose(score(9, 5), score(1004, 1000), rel_tol=1e-9)
    assert not math.isclose(score(9, 5), score(9, 6), rel_tol=1e-3)


def test_angles_keep_full_precision_under_bf16() -> None:
    """Positions above 256 are not all bf16 numbers: angles formed in bf16 would merge neighbouring tokens."""
    turn = rotation(torch.tensor([2049]), 8, 1e4, torch.bfloat16)
    assert turn.cos.dtype == torch.float32
    assert math.isclose(float(turn.cos[0, 0, 0]), math.cos(2049), abs_tol=1e-5)
    assert rotate(torch.ones(1, 1, 8, dtype=torch.bfloat16), turn).dtype == torch.bfloat16
