"""Epochs out of several sources: exact shares, no early repetition, a pure function of (seed, epoch)."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data import mix


def counts(source: np.ndarray, sources: int) -> list[int]:
    return np.bincount(source, minlength=sources).tolist()


def repetitions(source: np.ndarray, index: np.ndarray, s: int, size: int) -> tuple[int, int]:
    """How often the rarest and the commonest record of a source comes."""
    times = np.bincount(index[source == s], minlength=size)
    assert times.size == size
    return int(times.min()), int(times.max())


def test_all_of_one_source_and_an_equal_part_of_others():
    """The helpfulness reward model's mix: all of its data, as much again from two other sources."""
    source, index = mix([1000, 4000, 300], [None, 0.3, 0.2], seed=1, epoch=0)
    assert counts(source, 3) == [1000, 600, 400] and source.dtype == index.dtype == np.int64
    assert repetitions(source, index, 0, 1000) == (1, 1)
    assert repetitions(source, index, 1, 4000) == (0, 1)
    assert repetitions(source, index, 2, 300) == (1, 2)  # smaller than its part: goes round again


def test_ninety_to_ten():
    source, index = mix([900, 450, 5000], [None, None, 0.1], seed=1, epoch=0)
    assert counts(source, 3) == [900, 450, 150]
    assert repetitions(source, index, 1, 450) == (1, 1)


def test_without_a_whole_source_the_scarcest_sets_the_length():
    source, index = mix([70, 1000], [0.07, 0.93], seed=1, epoch=0)
    assert counts(source, 2) == [70, 930]
    assert repetitions(source, index, 0, 70) == (1, 1) and repetitions(source, index, 1, 1000) == (0, 1)
    assert counts(mix([7, 1000], [0.07, 0.93], seed=1, epoch=0)[0], 2) == [7, 93]  # 7 / 0.07 = 99.999… in floats


def test_each_time_round_and_each_epoch_have_their_own_order():
    def of_small(epoch: int, seed: int = 5) -> list[int]:
        source, index = mix([100, 40], [None, 0.5], seed, epoch)
        return index[source == 1].tolist()

    assert repetitions(*mix([100, 40], [None, 0.5], 5, 0), 1, 40) == (2, 3)
    assert len({tuple(of_small(epoch)) for epoch in range(5)}) == 5
    again = Counter(of_small(0)).most_common(20)
    assert {record for record, _ in again} != {record for record, _ in Counter(of_small(1)).most_common(20)}
    assert of_small(0, seed=6) != of_small(0) == of_small(0)


def test_the_order_is_mixed():
    source, index = mix([5000, 5000], [None, None], seed=2, epoch=3)
    halves = counts(source[:5000], 2)
    assert abs(halves[0] - 2500) < 5 * math.sqrt(5000 / 4)
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 5 / math.sqrt(index.size)
    assert not np.array_equal(source, mix([5000, 5000], [None, None], seed=2, epoch=4)[0])


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    weights=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    whole=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_shares_are_kept(sizes: list[int], weights: list[int], whole: list[bool], seed: int):
    n = len(sizes)
    total = sum(weights[:n])
    shares = [None if whole[s] or n == 1 else weights[s] / total for s in range(n)]
    try:
        source, index = mix(sizes, shares, seed, epoch=1)
    except ValueError as error:
        assert "is not one record in an epoch" in str(error)
        return
    taken = counts(source, n)
    for s, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        low, high = repetitions(source, index, s, size)
        assert high - low <= 1
        assert (taken[s] == size) if share is None else abs(taken[s] - share * source.size) < 1 + n / 2
        assert None in shares or high <= 1
    if None not in shares:  # the longest epoch without repetition
        assert source.size == math.floor(min(size * total / w for size, w in zip(sizes, weights, strict=False)) + 1e-6)


@pytest.mark.parametrize(
    ("sizes", "shares", "problem"),
    [
        ([], [], "0 sources with 0 shares"),
        ([5], [None, None], "1 sources with 2 shares"),
        ([5, 0], [None, 0.5], "source 1 has 0 records"),
        ([5], [1.0], "share 1.0 of source 0 is not between 0 and 1"),
        ([5, 5], [None, 0.0], "share 0.0 of source 1"),
        ([5, 5], [None, math.nan], "share nan of source 1"),
        ([5, 5, 5], [None, 0.5, 0.5], "add up to 1 and leave nothing"),
        ([5, 5], [0.5, 0.4], "add up to 0.9; make it 1"),
        ([5, 5], [None, 0.01], "share 0.01 of source 1 is not one record in an epoch of 5"),
    ],
)
def test_bad_shares(sizes: list[int], shares: list[float | None], problem: str):
    with pytest.raises(ValueError, match=problem):
        mix(sizes, shares, seed=0, epoch=0)
