"""First-fit packing: complete, within capacity, nearly full."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data import pack


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The oracle: every sequence stays open."""
    bins: list[list[int]] = []
    for record, length in enumerate(lengths):
        for held in bins:
            if sum(lengths[r] for r in held) + length <= capacity:
                held.append(record)
                break
        else:
            bins.append([record])
    return bins


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), open_bins=st.integers(1, 8))
def test_each_record_is_in_one_sequence_within_capacity(lengths: list[int], open_bins: int):
    bins = pack(lengths, 50, open_bins)
    assert sorted(record for held in bins for record in held) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in held) <= 50 and held == sorted(held) for held in bins)
    assert [held[0] for held in bins] == sorted(held[0] for held in bins)  # in the order of their beginning
    assert bins == pack(lengths, 50, open_bins)
    if open_bins == 1:  # the next sequence's first record did not fit behind the last one
        assert all(sum(lengths[r] for r in (*a, b[0])) > 50 for a, b in pairwise(bins))


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_with_enough_open_sequences_it_is_first_fit(lengths: list[int]):
    assert pack(lengths, 50, open_bins=60) == first_fit(lengths, 50)


def test_the_fullest_is_closed_first():
    # 60 and 80 are open; 50 needs a new sequence, so 80 (the fuller) closes and 15 goes to 60's.
    assert pack([60, 80, 50, 15], 100, open_bins=2) == [[0, 3], [1], [2]]
    assert pack([80, 80, 50, 15], 100, open_bins=2) == [[0], [1, 3], [2]]  # equally full: the older


@pytest.mark.parametrize(("median", "spread"), [(120, 1.0), (350, 0.8), (800, 0.6)])
def test_log_normal_lengths_fill_the_sequences(median: int, spread: float):
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(median), spread, 6000), 8, 4096).astype(int).tolist()
    bins = pack(lengths, 4096)
    assert sum(lengths) / (len(bins) * 4096) >= 0.97


@pytest.mark.parametrize(
    ("lengths", "open_bins", "problem"),
    [
        ([4, 11], 1, "record 1 has 11 tokens, a sequence holds 1 to 10"),
        ([0], 1, "record 0 has 0 tokens"),
        ([1], 0, "open_bins=0"),
    ],
)
def test_bad_lengths(lengths: list[int], open_bins: int, problem: str):
    with pytest.raises(ValueError, match=problem):
        pack(lengths, 10, open_bins)


def test_nothing_to_pack():
    assert pack([], 10) == []
