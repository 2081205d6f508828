"""Carbon against the paper's table; intervals and goodput against a simulation of failures and against Daly 2006."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.plan.cluster import Cluster, load_cluster
from megallama.plan.outlook import (
    LLAMA3_HOURS,
    PAPER,
    PAPER_TONNES,
    Outlook,
    Reliability,
    best_checkpoints,
    best_interval,
    carbon_tonnes,
    effective,
    goodput,
    outlook_of,
    record_of,
    sentences,
    with_rates,
)

RSC = load_cluster("rsc")
CASES = [
    # failure, work, save, restart, commit
    (3600.0, 600.0, 60.0, 300.0, None),
    (3600.0, 600.0, 10.0, 300.0, 400.0),
    (1000.0, 300.0, 20.0, 900.0, 320.0),  # the next save begins when the last is durable; restarts fail too
    (500.0, 100.0, 100.0, 50.0, None),
]
"""Seconds."""


def truncated(tonnes: float) -> float:
    return math.floor(100 * tonnes) / 100


def run(step_seconds: float = 10.0, gpus: int = 2048, steps: int = 10**6, cluster: Cluster = RSC) -> Outlook:
    return outlook_of(steps * 1000, step_seconds, 1000, gpus, cluster)


class Timeline(NamedTuple):
    """Saves that became durable in each of many spans from restart to restart, and what each span took."""

    durable: np.ndarray
    seconds: np.ndarray

    def goodput(self, work: float) -> tuple[float, float]:
        """Share of the time and its standard error (of a ratio of two means)."""
        share = work * self.durable.sum() / self.seconds.sum()
        errors = work * self.durable - share * self.seconds
        return share, float(errors.std() / math.sqrt(errors.size) / self.seconds.mean())


def simulated(failure: float, work: float, reliability: Reliability, spans: int, seed: int = 7) -> Timeline:
    """Plays events in their order: work, saves, commits, failures, restarts. Knows no formula."""
    rng = np.random.default_rng(seed)
    save, restart = reliability.save_seconds, reliability.restart_seconds
    commit = save if reliability.commit_seconds is None else reliability.commit_seconds
    durable, seconds = np.zeros(spans), np.zeros(spans)
    for span in range(spans):
        begun: list[float] = []
        fails, now = rng.exponential(failure), 0.0
        while now < fails:
            now = max(now + work, begun[-1] + commit if begun else 0.0)  # one save at a time
            begun.append(now)
            now += save
        durable[span] = sum(begin + commit <= fails for begin in begun)
        seconds[span] = fails
        while (again := rng.exponential(failure)) < restart:
            seconds[span] += again
        seconds[span] += restart
    return Timeline(durable, seconds)


def test_carbon_is_the_papers_to_the_printed_digit() -> None:
    full = [carbon_tonnes(row.gpu_hours, row.watts, RSC.pue, RSC.carbon) for row in PAPER]
    assert [truncated(tonnes) for tonnes in full] == [row.tonnes for row in PAPER]
    assert truncated(sum(full)) == PAPER_TONNES
    assert sum(row.gpu_hours for row in PAPER) == 3_311_616


def test_outlook_by_hand() -> None:
    found = outlook_of(1001, 36.0, 100, 8, with_rates(RSC, pue=1.25, carbon=0.5, price=2.0))
    assert found.steps == 11  # the last step is a whole one
    assert found.days == pytest.approx(11 * 36 / 86400)
    assert found.gpu_hours == pytest.approx(0.88)
    assert found.mwh == pytest.approx(0.88 * 400 * 1.25 / 1e6)
    assert found.tonnes == pytest.approx(found.mwh * 0.5)
    assert found.price == pytest.approx(1.76)


def test_a_rate_that_is_not_given_stays_the_clusters() -> None:
    assert with_rates(RSC) == RSC
    assert with_rates(RSC, carbon=0.0).carbon == 0
    assert run(cluster=with_rates(RSC, pue=1.0)).price is None


def test_outlook_of_a_row_of_the_paper() -> None:
    seconds = 1_720_320 * 3600 / 2048  # of 70B on 2048 GPUs
    found = outlook_of(2 * 10**12, seconds / 500_000, 4 * 10**6, 2048, RSC)
    assert found.gpu_hours == pytest.approx(1_720_320)
    assert truncated(found.tonnes) == 291.42


@pytest.mark.parametrize(("failure", "work", "save", "restart", "commit"), CASES)
def test_goodput_is_the_simulations(
    failure: float, work: float, save: float, restart: float, commit: float | None
) -> None:
    reliability = Reliability(save_seconds=save, restart_seconds=restart, commit_seconds=commit)
    share, error = simulated(failure, work, reliability, 20_000).goodput(work)
    assert error < 0.01 * share
    assert goodput(work, failure, reliability) == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("commit", [None, 200.0])
def test_best_interval_is_the_simulations(commit: float | None) -> None:
    reliability = Reliability(save_seconds=60, restart_seconds=300, commit_seconds=commit)
    best = best_interval(60, 3600)
    share, error = simulated(3600, best, reliability, 10_000).goodput(best)
    for other in (0.4 * best, 2.5 * best):
        worse, other_error = simulated(3600, other, reliability, 10_000, seed=8).goodput(other)
        assert worse + 4 * math.hypot(error, other_error) < share


@pytest.mark.parametrize(("failure", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_best_interval_is_that_of_daly(failure: float, minutes: float) -> None:
    """Figures 3 to 5 of "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006)."""
    assert best_interval(5, failure) == pytest.approx(minutes, rel=0.01)


@given(st.floats(-9, 3), st.floats(0, 6))
def test_best_interval_is_a_maximum(log_ratio: float, log_failure: float) -> None:
    failure = 10**log_failure
    reliability = Reliability(save_seconds=failure * 10**log_ratio, restart_seconds=1e-3 * failure)
    best = best_interval(reliability.save_seconds, failure)
    assert 0 < best <= failure
    at_best = goodput(best, failure, reliability)
    assert all(goodput(best * factor, failure, reliability) <= at_best * (1 + 1e-12) for factor in (0.5, 0.99, 1.01, 2))


@given(
    st.floats(0.1, 1000),
    st.integers(1, 10**5),
    st.floats(0.1, 300),
    st.floats(0, 900),
    st.sampled_from([5, 300, 10**6]),
)
def test_no_other_number_of_steps_is_better(step: float, gpus: int, save: float, lag: float, steps: int) -> None:
    reliability = Reliability(save_seconds=save, commit_seconds=save + lag)
    try:
        found = best_checkpoints(run(step, gpus, steps), reliability)
    except ValueError as error:
        assert "% of the time would do work that lasts" in str(error)
        return
    assert 1 <= found.steps <= steps
    assert found.seconds == found.steps * step
    assert found.steps == steps or found.seconds >= reliability.lag_seconds * (1 - 1e-9)
    for other in {max(found.steps + d, 1) for d in (-7, -1, 1, 7)}:
        if other <= steps and other * step >= reliability.lag_seconds:
            assert goodput(other * step, found.failure_seconds, reliability) <= found.goodput * (1 + 1e-12)


def test_without_failures_nothing_is_saved_before_the_end() -> None:
    found = best_checkpoints(run(step_seconds=10, steps=1000), Reliability(gpu_mtbf_hours=1e15))
    assert found.steps == 1000
    assert found.goodput == pytest.approx(10_000 / 10_030)
    assert goodput(10_000, 1e15, Reliability()) == pytest.approx(10_000 / 10_030)


def test_rare_failures_give_youngs_interval() -> None:
    found = best_checkpoints(run(gpus=8), Reliability())
    young = math.sqrt(2 * 30 * found.failure_seconds)
    assert found.best_seconds == pytest.approx(young, rel=0.01)
    assert found.best_seconds < young
    assert found.seconds == pytest.approx(found.best_seconds, abs=10)


def test_saves_in_the_background_wait_for_one_another() -> None:
    reliability = Reliability(save_seconds=0.5, commit_seconds=600)
    found = best_checkpoints(run(step_seconds=10), reliability)
    assert found.best_seconds < 300
    assert found.steps == 60  # not 59: 590 s of work, 0.5 s of a save
    held_up = best_checkpoints(run(step_seconds=10), Reliability(save_seconds=600))
    assert found.goodput > held_up.goodput + 0.05


def test_the_published_run_is_in_reach() -> None:
    """Llama 3 405B: a failure every three hours, and more than 90 % of the time effective."""
    assert round(LLAMA3_HOURS, -2) == 50_700
    found = best_checkpoints(run(gpus=16384), Reliability(save_seconds=5, commit_seconds=60))
    assert found.failure_seconds / 3600 == pytest.approx(3.1, abs=0.05)
    assert 0.9 < found.goodput < 0.95


def test_effective_stretches_all_by_the_goodput() -> None:
    ideal, reliability = run(cluster=with_rates(RSC, price=3.0)), Reliability()
    real, share = effective(ideal, reliability), best_checkpoints(ideal, reliability).goodput
    assert 0.9 < share < 1
    assert (real.tokens, real.steps, real.step_seconds) == (ideal.tokens, ideal.steps, ideal.step_seconds)
    for name in ("seconds", "days", "gpu_hours", "mwh", "tonnes", "price"):
        assert getattr(real, name) == pytest.approx(getattr(ideal, name) / share)
    assert effective(real, reliability) == real


def test_sentences_tell_it_in_plain_lines() -> None:
    ideal = outlook_of(2 * 10**12, 9.0, 4 * 10**6, 2048, with_rates(RSC, price=2.0))
    text = "\n".join(sentences(ideal, Reliability()))
    real, saves = effective(ideal, Reliability()), best_checkpoints(ideal, Reliability())
    for words in (
        "2,000,000,000,000 tokens are 500,000 steps of 9 seconds: 52.1 days on 2,048 GPUs (rsc)",
        "A failure every 24.7 hours is assumed, one in 50,677 GPU-hours, with a restart of 10 minutes",
        f"A checkpoint every {saves.steps} steps = {saves.seconds / 60:.3g} minutes is best at 30 seconds a save",
        f"goodput {100 * saves.goodput:.1f} %",
        f"takes {real.days:.3g} days, {real.gpu_hours:,.0f} GPU-hours and {real.mwh:,.0f} MWh at 400 W",
        f"{real.tonnes:.0f} tCO2eq at 0.385 kg a kWh, not counting interconnect, hosts, cooling beyond the PUE",
        f"It costs {real.price:,.0f} at 2 a GPU-hour",
    ):
        assert words in text
    assert sentences(real, Reliability()) == sentences(ideal, Reliability())
    assert "What it costs is not known" in "\n".join(sentences(ideal._replace(cluster=RSC), Reliability()))


def test_a_run_shorter_than_a_save_has_an_outlook_and_hopeless_failures_have_none() -> None:
    short = outlook_of(3000, 0.1, 1000, 1, RSC)
    saves = best_checkpoints(short, Reliability())
    assert saves.steps == 3 and 0 < saves.goodput < 0.011
    with pytest.raises(ValueError, match="of the time would do work that lasts"):
        best_checkpoints(outlook_of(2 * 10**12, 9.0, 4 * 10**6, 2048, RSC), Reliability(gpu_mtbf_hours=50))


def test_the_record_has_the_numbers_of_the_sentences() -> None:
    ideal = outlook_of(2 * 10**12, 9.0, 4 * 10**6, 2048, with_rates(RSC, price=2.0))
    found, real = record_of(ideal, Reliability()), effective(ideal, Reliability())
    assert found["steps"] == 500_000 and found["price"] == 2 * found["gpu_hours"] == pytest.approx(real.price)
    assert found["days"] * found["goodput"] == pytest.approx(found["days_without_failures"])
    assert found["tonnes_co2eq"] == real.tonnes and found["failure_hours"] == pytest.approx(24.74, abs=0.01)


@pytest.mark.parametrize("name", ["tokens", "step_seconds", "step_tokens", "gpus"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_outlook_refuses_what_is_no_run(name: str, value: float) -> None:
    arguments = {"tokens": 1000, "step_seconds": 1.0, "step_tokens": 10, "gpus": 8} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}={value:g} must be more than 0 and finite$"):
        outlook_of(cluster=RSC, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", Reliability._fields)
def test_reliability_must_be_positive(name: str) -> None:
    for value in (0.0, -3.0):
        with pytest.raises(ValueError, match=f"^{name}={value:g} must be more than 0"):
            best_checkpoints(run(), Reliability()._replace(**{name: value}))


def test_rates_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^pue=0.9 must be at least 1 and finite$"):
        with_rates(RSC, pue=0.9)
    with pytest.raises(ValueError, match=r"^carbon=-1 must be at least 0"):
        with_rates(RSC, carbon=-1)


def test_a_save_is_not_durable_before_it_ends() -> None:
    with pytest.raises(ValueError, match=r"commit_seconds=20 must be at least save_seconds=30"):
        best_checkpoints(run(), Reliability(commit_seconds=20))


@pytest.mark.parametrize(
    "hopeless",
    [
        (run(gpus=2048), Reliability(gpu_mtbf_hours=10, restart_seconds=600)),
        (run(step_seconds=1e5, gpus=16384), Reliability()),
        (run(), Reliability(gpu_mtbf_hours=1e-9)),
    ],
)
def test_no_progress_is_refused(hopeless: tuple[Outlook, Reliability]) -> None:
    outlook, reliability = hopeless
    with pytest.raises(ValueError, match=rf"^gpu_mtbf_hours={reliability.gpu_mtbf_hours:g} on .* take fewer GPUs"):
        best_checkpoints(outlook, reliability)
