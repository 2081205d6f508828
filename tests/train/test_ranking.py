"""The ranking loss and the reports on reward models against the formulas, written out pair by pair in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megallama.data.batch import IGNORE, Batch
from megallama.train.ranking import (
    MARGINS,
    Judged,
    RankingLoss,
    accuracy_by_rating,
    calibration,
    expected_calibration_error,
    margin_of,
)

NAN = math.nan


def batch(lengths: list[int], margin: list[float], safe: list[float] | None = None, multiple: int = 1) -> Batch:
    """Rows of these lengths, chosen and rejected in turn."""
    rows = [(torch.arange(n) + 1, torch.full((n,), IGNORE)) for n in lengths]
    packed = Batch.pack(rows, multiple)
    ends = torch.tensor(packed.bounds[1 : len(lengths) + 1], dtype=torch.int64) - 1
    extras = {"ends": ends, "margin": torch.tensor(margin)}
    if safe is not None:
        extras["safe"] = torch.tensor(safe)
    return Batch(packed.tokens, packed.labels, packed.positions, packed.bounds, len(margin), extras)


def values_with(scores: list[float], at: Tensor, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(T, 1) where the rows' scores stand at their ends and any other token holds something else."""
    values = torch.full((tokens, 1), 77.0, dtype=dtype)
    values[at, 0] = torch.tensor(scores, dtype=dtype)
    return values


def single(chosen: float, rejected: float, margin: float) -> float:
    one = batch([2, 3], [margin])
    return RankingLoss()(values_with([chosen, rejected], one.extras["ends"], 5), one)[0].item()


def test_hand_values_of_one_pair():
    assert single(0, 0, 0) == pytest.approx(math.log(2), rel=1e-12)
    assert single(2, 0.5, 1) == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-12)
    assert single(0.5, 2, 1) == pytest.approx(math.log(1 + math.exp(2.5)), rel=1e-12)


def test_the_loss_rises_with_the_margin():
    losses = [single(1.0, 0.25, m) for m in (0.0, 1 / 3, 2 / 3, 1.0, 3.0)]
    assert losses == sorted(losses) and len(set(losses)) == 5
    assert losses[-1] == pytest.approx(math.log(1 + math.exp(2.25)), rel=1e-12)  # c - r - m = -2.25


def test_far_apart_scores_neither_overflow_nor_vanish():
    assert single(-1e4, 1e4, 1) == 20001
    assert single(40, 0, 0) == pytest.approx(math.exp(-40), rel=1e-9)
    assert single(1e4, -1e4, 1) == 0


@pytest.mark.parametrize("weight", (0.0, 0.7))
@pytest.mark.parametrize("multiple", (1, 4))
def test_sums_metrics_and_gradient_against_loops(weight, multiple):
    lengths, margins = [2, 3, 1, 4, 3, 2, 2, 1], [1.0, 0.0, 1 / 3, 3.0]
    scores, safe = [0.5, -1.0, 0.25, 0.25, -2.0, 1.5, 3.0, 2.0], [1, 0, NAN, 1, NAN, NAN, 1, 1]
    data = batch(lengths, margins, safe, multiple)
    values = values_with(scores, data.extras["ends"], data.length).requires_grad_()
    loss, metrics = RankingLoss(weight)(values, data)
    loss.backward()

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    pairs = list(zip(scores[::2], scores[1::2], margins, strict=True))
    ranking = -sum(math.log(sigma(c - r - m)) for c, r, m in pairs)
    labelled = [(s, y) for s, y in zip(scores, safe, strict=True) if not math.isnan(y)]
    safety = -sum(math.log(sigma(s) if y else 1 - sigma(s)) for s, y in labelled) / 2
    assert loss.item() == pytest.approx(ranking + weight * safety, rel=1e-7)  # margins came as fp32
    expected = {
        "reward_accuracy": 1 + 0.5 + 0 + 1,  # the second pair is a tie
        "reward_margin": sum(c - r for c, r, _ in pairs),
        "reward_chosen": sum(c for c, _, _ in pairs),
        "reward_rejected": sum(r for _, r, _ in pairs),
    }
    if weight:
        expected["safety_loss"] = safety
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert not any(x.requires_grad for x in metrics.values())

    slopes = torch.zeros(data.length, dtype=torch.float64)
    for n, end in enumerate(data.extras["ends"].tolist()):
        c, r, m = pairs[n // 2]
        slopes[end] = (1 if n % 2 else -1) * (1 - sigma(c - r - m))
        if not math.isnan(safe[n]):
            slopes[end] += weight * (sigma(scores[n]) - safe[n]) / 2
    torch.testing.assert_close(values.grad[:, 0], slopes, rtol=1e-7, atol=1e-9)


def test_gradcheck():
    data = batch([1, 2, 3, 1], [1.0, 0.0], [1, NAN, 0, 1])
    values = torch.randn(data.length, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = RankingLoss(0.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, data)[0], (values.requires_grad_(),))


def test_pairs_without_any_label_have_no_safety_loss():
    data = batch([1, 1], [0.0], [NAN, NAN])
    values = values_with([1.0, 2.0], data.extras["ends"], 2).requires_grad_()
    loss, metrics = RankingLoss(5.0)(values, data)
    loss.backward()
    assert metrics["safety_loss"] == 0 and loss.item() == single(1.0, 2.0, 0.0)
    assert values.grad.isfinite().all()


def test_a_micro_batch_without_pairs_is_zero_and_still_has_a_graph():
    data = Batch.pack([(torch.zeros(3, dtype=torch.int64), torch.full((3,), IGNORE))])
    extras = {"ends": torch.empty(0, dtype=torch.int64), "margin": torch.empty(0), "safe": torch.empty(0)}
    data = Batch(data.tokens, data.labels, data.positions, data.bounds, 0, extras)
    values = torch.ones(3, 1, requires_grad=True)
    loss, metrics = RankingLoss(1.0)(values, data)
    loss.backward()
    assert loss == 0 and all(x == 0 for x in metrics.values()) and not values.grad.any()


@pytest.mark.parametrize(("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(given, kept):
    data = batch([1, 1], [1.0], [1.0, 0.0])
    loss, metrics = RankingLoss(1.0)(values_with([0.5, 0.25], data.extras["ends"], 2, given), data)
    assert {x.dtype for x in (loss, *metrics.values())} == {kept}


def test_margins_are_the_papers():
    assert list(MARGINS["small"].values()) == [1, 2 / 3, 1 / 3, 0]
    assert list(MARGINS["large"].values()) == [3, 2, 1, 0]
    assert set(MARGINS["none"].values()) == {0}
    assert all(type(margin) is float for table in MARGINS.values() for margin in table.values())  # tensors of them too
    order = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    assert all(list(table) == order for table in MARGINS.values())


@pytest.mark.parametrize(
    ("rating", "margin", "kind", "expected"),
    [
        ("better", None, "small", 2 / 3),
        ("better", None, "large", 2.0),
        ("better", None, "none", 0.0),
        ("better", 0.25, "small", 0.25),
        ("significantly_better", 0.0, "large", 0.0),  # 0.0 is a margin, not a missing one
        (None, 0.25, "large", 0.25),
        (None, None, "large", 0.0),
        ("better", 0.25, "none", 0.0),
    ],
)
def test_margin_of(rating, margin, kind, expected):
    assert margin_of(rating, margin, kind) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("better", None, "huge"), "margin 'huge' is unknown; choose one of none, small, large"),
        (("good", None, "small"), "rating 'good' is unknown; choose one of significantly_better, better"),
        (("good", None, "none"), "rating 'good' is unknown"),
        (("better", NAN, "small"), "margin is nan; it must be a finite number"),
        (("better", math.inf, "none"), "margin is inf"),
    ],
)
def test_bad_margins_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        margin_of(*args)


def judged(*pairs: tuple[float, str | None]) -> list[Judged]:
    return [Judged(difference, rating, "a") for difference, rating in pairs]


def test_accuracy_by_rating():
    found = accuracy_by_rating(
        judged((1, "better"), (-1, "better"), (2, "significantly_better"), (0, None), (3, None), (-2, "better"))
    )
    assert found == {
        "significantly_better": (1.0, 1),
        "better": (1 / 3, 3),
        "unrated": (0.75, 2),
        "all": (3.5 / 6, 6),
    }
    assert list(found) == ["significantly_better", "better", "unrated", "all"]


def test_accuracy_of_nothing_and_of_broken_scores():
    (share, n) = accuracy_by_rating([])["all"]
    assert math.isnan(share) and n == 0
    for report in (accuracy_by_rating, calibration):
        with pytest.raises(ValueError, match=r"2 of 3 score differences are not finite \(pair 1 first\)"):
            report(judged((1, None), (NAN, None), (math.inf, None)))
    with pytest.raises(ValueError, match="rating 'fine' is unknown"):
        accuracy_by_rating(judged((1, "fine")))


def test_calibration_by_hand():
    """sigma(1) = 0.731 and sigma(0.1) = 0.525; people disagree once with each kind of prediction."""
    strong, weak = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.1))
    rows = calibration(judged((1, None), (1, None), (-1, None), (0.1, None), (-0.1, None), (0, None)), bins=5)
    assert [(row.lo, row.hi, row.n) for row in rows] == [(0.5, 0.6, 3), (0.7, 0.8, 3)]
    assert [row.accuracy for row in rows] == pytest.approx([1.5 / 3, 2 / 3])
    assert [row.predicted for row in rows] == pytest.approx([(2 * weak + 0.5) / 3, strong])
    error = (3 * abs(0.5 - (2 * weak + 0.5) / 3) + 3 * abs(2 / 3 - strong)) / 6
    assert expected_calibration_error(rows) == pytest.approx(error)


def test_certain_predictions_are_in_the_last_bin():
    (row,) = calibration(judged((800, None), (-800, None)), bins=4)
    assert (row.lo, row.hi, row.n, row.predicted, row.accuracy) == (0.875, 1.0, 2, 1.0, 0.5)
    assert expected_calibration_error([row]) == 0.5
    assert calibration([]) == [] and math.isnan(expected_calibration_error([]))
    with pytest.raises(ValueError, match="at least 1 bin, not 0"):
        calibration([], bins=0)


def test_a_model_that_means_what_it_says_is_calibrated():
    """Differences drawn, and people who prefer the first answer with probability sigma(difference)."""
    random = torch.Generator().manual_seed(3)
    lead = torch.randn(20000, generator=random, dtype=torch.float64) * 2
    agree = torch.rand(20000, generator=random, dtype=torch.float64) < lead.abs().sigmoid()
    verdicts = [Judged(x, None, "a") for x in torch.where(agree, lead.abs(), -lead.abs()).tolist()]
    assert expected_calibration_error(calibration(verdicts)) < 0.02
    doubled = [Judged(2 * v.difference, None, "a") for v in verdicts]
    assert expected_calibration_error(calibration(doubled)) > 0.05
