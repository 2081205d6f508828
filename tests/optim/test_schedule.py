"""The learning rate against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from megallama.config import OptimConfig
from megallama.optim import learning_rate


def rates(steps: int, **optim) -> list[float]:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, **optim)
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_warm_up_then_cosine_by_hand() -> None:
    """Four steps up, then a cosine over four: its share is (1 + cos(pi * n/4)) / 2 for n = 1 … 4."""
    share = [(2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]
    expected = [0.25, 0.5, 0.75, 1.0, *(0.1 + 0.9 * s for s in share)]
    assert rates(8, warmup_steps=4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [1, 2, 7, 10])
def test_the_peak_stands_at_the_last_warm_up_step_exactly(warmup: int) -> None:
    found = rates(10, warmup_steps=warmup)
    assert found[warmup - 1] == 1.0
    assert found.count(1.0) == 1


@pytest.mark.parametrize("warmup", [0, 1, 2, 9])
def test_the_last_step_has_the_lowest_rate_exactly(warmup: int) -> None:
    assert rates(10, warmup_steps=warmup)[-1] == 0.1


def test_no_warm_up_starts_on_the_cosine() -> None:
    found = rates(4, warmup_steps=0)
    assert found == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)], rel=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert rates(5, warmup_steps=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(4, warmup_steps=8) == [0.125, 0.25, 0.375, 0.5]


def test_steps_behind_the_last_keep_the_lowest_rate() -> None:
    assert learning_rate(OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=1), 99, 10) == 0.1
