"""The order of samples: bijections, randomness, exact blends."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data import Blend, Order, key, permute

WORD = 2**64 - 1


def mix_oracle(x: int) -> int:
    """SplitMix64's output function in plain integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def permute_oracle(i: int, n: int, k: int) -> int:
    """The Feistel walk in plain integers, one number at a time."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(i, b)
        for r in range(16 if n < 64 else 8):
            word = k + r * 0x9E3779B97F4A7C15
            if r % 2 == 0:
                left = (left + ((mix_oracle((right + word) & WORD) >> 32) * a >> 32)) % a
            else:
                right = (right + ((mix_oracle((left + word) & WORD) >> 32) * b >> 32)) % b
        i = left * b + right
        if i < n:
            return i


def test_key_is_the_published_generator():
    """SplitMix64 seeded with 1234567 begins with this number (Vigna's reference implementation)."""
    assert int(key(1234567)) != int(key(1234568))
    assert mix_oracle((1234567 + 0x9E3779B97F4A7C15) & WORD) == 6457827717110365317
    first = mix_oracle((mix_oracle((0x9E3779B97F4A7C15 + 5) & WORD) ^ 7) + 0x9E3779B97F4A7C15 & WORD)
    assert int(key(5, 7)) == first
    assert key(5, np.array([7, 8])).tolist() == [int(key(5, 7)), int(key(5, 8))]


@given(n=st.integers(1, 3000), k=st.integers(0, WORD))
def test_permute_is_a_bijection(n: int, k: int):
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint64(k))), np.arange(n))


@given(n=st.integers(1, 2**62), k=st.integers(0, WORD), data=st.data())
def test_permute_equals_the_oracle(n: int, k: int, data: st.DataObject):
    i = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    expected = [permute_oracle(x, n, k) for x in i]
    assert permute(i, n, np.uint64(k)).tolist() == expected
    assert permute(np.array(i), n, np.full(len(i), k, np.uint64)).tolist() == expected


def chi_square(counts: np.ndarray) -> float:
    """How far equally likely counts are from equal, in standard deviations of the statistic."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_all_orders_of_four_are_equally_likely():
    keys = key(1, np.arange(48_000))
    orders = Counter(zip(*(permute(np.full(keys.shape, i), 4, keys).tolist() for i in range(4)), strict=True))
    assert set(orders) == set(permutations(range(4)))
    assert abs(chi_square(np.array(list(orders.values())))) < 5


@pytest.mark.parametrize("n", [7, 50, 64, 100])
def test_places_and_neighbours_are_equally_likely(n: int):
    """Where an item goes, and how far the next one lies from it, are uniform over keys."""
    keys = key(2, np.arange(200 * n))
    first, second = (permute(np.full(keys.shape, i), n, keys) for i in (n // 2, n // 2 + 1))
    assert abs(chi_square(np.bincount(first, minlength=n))) < 5
    assert abs(chi_square(np.bincount((second - first) % n, minlength=n)[1:])) < 5


def test_one_epoch_of_a_large_set_looks_random():
    n = 1_000_003
    x = permute(np.arange(100_000), n, key(3))
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / math.sqrt(x.size)
    assert abs(chi_square(np.bincount(x * 100 // n, minlength=100))) < 5
    ascents = np.count_nonzero(np.diff(x) > 0) / (x.size - 1)
    assert abs(ascents - 0.5) < 5 * math.sqrt(1 / 12 / x.size)


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), start=st.integers(0, 2**31))
def test_every_prefix_of_a_blend_is_within_two_samples_of_exact(weights: list[float], start: int):
    source, index = Blend(weights)(np.arange(2000))
    share = np.array(weights) / sum(weights)
    for s in range(len(weights)):
        assert index[source == s].tolist() == list(range(np.count_nonzero(source == s)))  # gapless
        taken = np.cumsum(source == s)
        assert np.abs(taken - share[s] * np.arange(1, 2001)).max() <= 2 + 1e-5
    # Far into a run the same holds: the index inside a source is what the source has given so far.
    source, index = Blend(weights)(np.arange(start, start + 50))
    assert np.abs(index - share[source] * np.arange(start, start + 50)).max() <= 2 + 12 * start / 2**30


def test_the_worst_chain_of_weights_stays_within_two():
    weights = [1.0, 1.0, *(1.9 * 2.0**k for k in range(10))]
    source, _ = Blend(weights)(np.arange(20_000))
    for s, weight in enumerate(weights):
        error = np.cumsum(source == s) - weight / sum(weights) * np.arange(1, 20_001)
        assert np.abs(error).max() <= 2


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.nan], [math.inf]])
def test_bad_weights(weights: list[float]):
    with pytest.raises(ValueError, match="weight"):
        Blend(weights)


@pytest.mark.parametrize("i", [-1, 2**32])
def test_samples_outside_a_run(i: int):
    with pytest.raises(ValueError, match=str(i)):
        Blend([1.0, 2.0])(i)


def test_order_visits_each_sample_once_an_epoch_in_ever_new_orders():
    order = Order([3.0, 1.0], [30, 17], seed=5)
    places = order(np.arange(400))
    for s, size in enumerate(order.sizes):
        positions = places.position[places.source == s]
        epochs = places.epoch[places.source == s]
        full = [positions[epochs == e].tolist() for e in range(int(epochs.max()))]
        assert all(sorted(epoch) == list(range(size)) for epoch in full)
        assert len({tuple(epoch) for epoch in full}) == len(full) > 3


def test_order_does_not_depend_on_how_it_is_asked():
    order = Order([1.0, 2.0, 0.5], [10, 20, 30], seed=6)
    whole = np.stack(order(np.arange(300)))
    assert np.array_equal(whole, np.concatenate([np.stack(order(i)) for i in range(300)], axis=1))
    assert not np.array_equal(whole, np.stack(Order([1.0, 2.0, 0.5], [10, 20, 30], seed=7)(np.arange(300))))
