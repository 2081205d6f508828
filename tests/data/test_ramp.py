"""The batch-size ramp: gapless samples, sizes that only grow, levels of equal length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.ramp import BatchPlan


def test_without_a_ramp_steps_are_alike() -> None:
    plan = BatchPlan(8)
    assert [plan(step) for step in (1, 2, 1000)] == [(0, 8), (8, 8), (7992, 8)]


def test_a_ramp_by_hand() -> None:
    """From 2 by 2 to 6 over 20 samples: two levels of 10 samples, the second rounded up to three steps."""
    plan = BatchPlan(6, start=2, increment=2, samples=20)
    sizes = [2] * 5 + [4] * 3 + [6] * 4
    assert [plan(step)[1] for step in range(1, 13)] == sizes
    assert [plan(step)[0] for step in range(1, 13)] == [sum(sizes[:n]) for n in range(12)]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 6), st.integers(0, 500))
def test_every_ramp(start: int, increment: int, rises: int, samples: int) -> None:
    size = start + rises * increment
    plan = BatchPlan(size, start, increment, samples)
    consumed, sizes = 0, []
    for step in range(1, samples + 10):
        first, now = plan(step)
        assert first == consumed, "no sample is skipped or taken twice"
        consumed += now
        sizes.append(now)
    assert sizes == sorted(sizes), "a step is never smaller than the one before"
    assert set(sizes) <= set(range(start, size + 1, increment))
    assert sizes[-1] == size
    ramped = sum(s for s in sizes if s < size)
    levels = len({s for s in sizes if s < size})
    if samples and rises:
        assert levels == rises
        # Each level is rounded up by less than one step.
        assert samples <= ramped < samples + sum(range(start, size, increment))


@pytest.mark.parametrize("step", [1, 10**9])
def test_far_steps_cost_nothing(step: int) -> None:
    plan = BatchPlan(1024, start=32, increment=32, samples=10**12)
    first, size = plan(step)
    assert size in range(32, 1025, 32) and first >= 32 * (step - 1)
