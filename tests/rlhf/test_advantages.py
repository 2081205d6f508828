"""Advantages against the O(T²) sum of their definition, and whitening against numpy's mean and deviation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallama.rlhf.ppo.advantages import gae, moments, row_ends, whiten_by


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounds_of(lengths: list[int]) -> tuple[int, ...]:
    return tuple(int(x) for x in np.cumsum([0, *lengths]))


def oracle(rewards: Tensor, values: Tensor, bounds: tuple[int, ...], gamma: float, lam: float) -> list[float]:
    out = []
    for lo, hi in pairwise(bounds):
        r, v = rewards[lo:hi].tolist(), [*values[lo:hi].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(hi - lo)]
        out += [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, hi - lo)) for t in range(hi - lo)]
    return out


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), max_size=7),
    gamma=st.sampled_from([1.0, 0.97, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    seed=st.integers(0, 99),
)
def test_against_the_definition(lengths, gamma, lam, seed):
    bounds = bounds_of(lengths)
    rewards, values = draw(bounds[-1], seed), draw(bounds[-1], seed + 100)
    advantages, returns = gae(rewards, values, bounds, gamma, lam)
    expected = torch.tensor(oracle(rewards, values, bounds, gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected + values, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """gamma 0.5, lam 0.5: delta = (1 + 0.5*4 - 2, 8 - 4) = (1, 4), so A = (1 + 0.25*4, 4)."""
    advantages, returns = gae(torch.tensor([1.0, 8.0]), torch.tensor([2.0, 4.0]), (0, 2), 0.5, 0.5)
    assert advantages.tolist() == [2.0, 4.0] and returns.tolist() == [4.0, 8.0]


def test_lambda_one_is_the_rest_of_the_rewards_less_the_value():
    rewards, values = draw(6, 1), draw(6, 2)
    advantages, returns = gae(rewards, values, (0, 4, 6), 1.0, 1.0)
    rest = torch.tensor([rewards[t : 4 if t < 4 else 6].sum() for t in range(6)], dtype=torch.float64)
    torch.testing.assert_close(returns, rest)
    torch.testing.assert_close(advantages, rest - values)


def test_nothing_leaks_from_row_to_row():
    """A row's advantages are bitwise the same whatever lies beside it."""
    rewards, values = draw(12, 3), draw(12, 4)
    together, _ = gae(rewards, values, (0, 5, 6, 12), 0.99, 0.95)
    for lo, hi in ((0, 5), (5, 6), (6, 12)):
        alone, _ = gae(rewards[lo:hi], values[lo:hi], (0, hi - lo), 0.99, 0.95)
        assert torch.equal(together[lo:hi], alone)
    rewards[5], values[5] = 1e6, -1e6
    other, _ = gae(rewards, values, (0, 5, 6, 12), 0.99, 0.95)
    assert torch.equal(other[:5], together[:5]) and torch.equal(other[6:], together[6:])


def test_inputs_stay_and_precision_is_kept():
    rewards, values = draw(4, 5), draw(4, 6)
    before = rewards.clone(), values.clone()
    assert gae(rewards, values, (0, 1, 4), 1.0, 0.95)[0].dtype == torch.float64
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])
    advantages, returns = gae(rewards.bfloat16(), values.bfloat16(), (0, 1, 4), 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32


def test_no_rows_and_empty_rows():
    advantages, returns = gae(torch.empty(0), torch.empty(0), (0,), 1.0, 0.95)
    assert advantages.shape == returns.shape == (0,)
    with pytest.raises(ValueError, match=r"2 of 4 answers have no token \(row 1 first\)"):
        gae(torch.ones(3), torch.ones(3), (0, 2, 2, 3, 3), 1.0, 0.95)
    with pytest.raises(AssertionError, match="bounds 0 … 3 of 4 tokens"):
        row_ends((0, 3), torch.ones(4))


def test_whitened_over_the_whole_however_it_is_cut():
    x = draw(40, 7) * 3 + 5
    expected = (x.numpy() - x.numpy().mean()) / x.numpy().std()
    whole = whiten_by(x, moments(x))
    torch.testing.assert_close(whole, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert whole.mean().item() == pytest.approx(0, abs=1e-12)
    assert whole.std(correction=0).item() == pytest.approx(1, rel=1e-12)
    parts = x.split([1, 9, 0, 30])  # ranks that hold different numbers of tokens, one of them none
    total = torch.stack([moments(part) for part in parts]).sum(0)
    torch.testing.assert_close(torch.cat([whiten_by(part, total) for part in parts]), whole, rtol=1e-12, atol=1e-12)
    by_part = torch.cat([whiten_by(part, moments(part)) for part in parts if len(part)])
    assert (by_part - whole).abs().max() > 0.1  # what whitening each rank by itself would have given


def test_moments():
    assert moments(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 21.0, 3.0]
    assert moments(torch.empty(0)).tolist() == [0.0, 0.0, 0.0]
    assert moments(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float64


def test_equal_advantages_are_not_blown_up():
    x = torch.full((7,), 0.1)
    assert whiten_by(x, moments(x)).abs().max() < 1e-6
    assert whiten_by(x, moments(x)).dtype == torch.float32
