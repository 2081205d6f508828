"""The element-wise segments: their formulas, their rounding, and the same numbers when compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megallama.model.rope import rotate, rotation
from megallama.model.segments import PLAIN, Segments, compiled, rms_norm, split_rotate, swiglu

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, 6, 10


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_rms_norm_is_the_formula() -> None:
    x, weight = random(3, 8), random(8, seed=1)
    for row, y in zip(x, rms_norm(x, weight, 0.5), strict=True):
        rms = (sum(float(v) ** 2 for v in row) / 8 + 0.5) ** 0.5
        torch.testing.assert_close(y, row / rms * weight, rtol=1e-14, atol=0)


def test_rms_norm_is_wide_inside() -> None:
    """Normalised in fp32 and rounded once, before the weight, as in HF Llama."""
    x, weight = random(4, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    normalised = rms_norm(x.float(), torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), normalised * weight)


def test_split_rotate_turns_queries_and_keys_alone() -> None:
    qkv = random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    turn = rotation(torch.arange(TOKENS), HEAD_DIM, 100.0, torch.float64)
    q, k, v = split_rotate(qkv, turn, HEADS, KV_HEADS)
    heads = qkv.view(TOKENS, -1, HEAD_DIM)
    assert torch.equal(q, rotate(heads[:, :HEADS], turn))
    assert torch.equal(k, rotate(heads[:, HEADS : HEADS + KV_HEADS], turn))
    assert torch.equal(v, heads[:, HEADS + KV_HEADS :])


def test_swiglu_gates_with_the_first_half() -> None:
    gate, up = random(5, 7), random(5, 7, seed=1)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), 1)), gate / (1 + (-gate).exp()) * up)


def _norm(segments: Segments, x: Tensor, other: Tensor) -> Tensor:
    return segments.rms_norm(x, other, 1e-5)


def _turn(segments: Segments, x: Tensor, other: Tensor) -> Tensor:
    turn = rotation(torch.arange(len(x)), HEAD_DIM, 100.0, x.dtype)
    q, k, v = segments.split_rotate(x * other, turn, HEADS, KV_HEADS)
    return torch.cat([part.flatten() for part in (q, k, v)])


def _gate(segments: Segments, x: Tensor, other: Tensor) -> Tensor:
    return segments.swiglu(x * other)


@pytest.mark.slow
@pytest.mark.parametrize("use", [_norm, _turn, _gate])
def test_compiled_equals_plain(use: Callable[[Segments, Tensor, Tensor], Tensor]) -> None:
    """Outputs and gradients."""
    results = []
    for segments in (PLAIN, compiled()):
        x = random(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32).requires_grad_()
        other = random(x.shape[1], dtype=torch.float32, seed=1).requires_grad_()
        y = use(segments, x, other)
        y.backward(random(*y.shape, dtype=torch.float32, seed=2))
        results.append((y.detach(), x.grad, other.grad))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
