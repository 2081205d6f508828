"""The fit of the planner's constants, on measurements that are made up from known ones."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megallama.plan.machine import Constants

pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fit_planner

TRUTH = Constants(matmul=0.74, memory=0.9, link=0.72, fabric=0.86, latency=9e-6, launch=7e-4, kernel=1.4e-4, step=0.03)


@pytest.fixture(scope="module")
def rows() -> list[fit_planner.Measured]:
    """Some of each group, as if TRUTH had been measured."""
    read = fit_planner.read(fit_planner.MEASURED)
    some = [row for row in read if row.group != fit_planner.SINGLE] + read[::24]
    return [replace(row, seconds=row.predicted(TRUTH)) for row in some]


def test_the_fit_finds_the_constants_that_made_the_measurements(rows: list[fit_planner.Measured]):
    found = fit_planner.fit(rows)
    assert max(fit_planner.errors(rows, found).values()) < 0.015
    assert found.matmul == pytest.approx(TRUTH.matmul, rel=0.03) and found.memory == pytest.approx(0.9, rel=0.1)


def test_regret_is_what_the_predicted_best_loses(rows: list[fit_planner.Measured]):
    assert all(lost == 0 for found in fit_planner.regrets(rows, TRUTH).values() for lost in found)
    question = [row for row in rows if row.group == "18.4B"]
    best = min(question, key=lambda row: row.predicted(TRUTH))
    others = min(row.seconds for row in question if row is not best)
    slowed = [replace(row, seconds=2 * others) if row is best else row for row in question]
    assert fit_planner.regrets(slowed, TRUTH) == {"18.4B": [pytest.approx(1.0)]}
