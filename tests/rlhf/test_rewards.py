"""Rewards against the paper's formulas: which model decides, whitening, and where the score and the KL penalty go."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megallama.rlhf.judges import SAFETY_LOGIT, combined
from megallama.rlhf.ppo.rewards import token_rewards, whiten

HELPFUL = 0.75


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(safety: float, tagged: bool, dtype: torch.dtype = torch.float64) -> float:
    scores = torch.tensor([HELPFUL], dtype=dtype), torch.tensor([safety], dtype=dtype)
    return combined(*scores, torch.tensor([tagged])).item()


def test_the_threshold_is_a_logit():
    assert pytest.approx(-1.7346, abs=5e-5) == SAFETY_LOGIT
    assert 1 / (1 + math.exp(-SAFETY_LOGIT)) == pytest.approx(0.15, rel=1e-15)


@pytest.mark.parametrize(
    ("below", "tagged", "safety_decides"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, True)],
)
def test_either_the_tag_or_a_low_score_makes_safety_decide(below, tagged, safety_decides):
    score = SAFETY_LOGIT - 0.01 if below else SAFETY_LOGIT + 0.01
    assert chosen(score, tagged) == (score if safety_decides else HELPFUL)


def test_it_flips_exactly_at_the_logit():
    below = math.nextafter(SAFETY_LOGIT, -math.inf)
    assert chosen(SAFETY_LOGIT, False) == HELPFUL and chosen(below, False) == below
    for score in (-0.2, 0.0, 0.1, 0.149, 0.2):  # 0.15 compared with a logit would take some of these for unsafe
        assert chosen(score, False) == HELPFUL


@pytest.mark.parametrize("threshold", (0.15, 0.2))  # in fp32 the first logit is rounded up, the second down
def test_fp32_scores_are_compared_without_rounding_the_threshold(threshold):
    limit = math.log(threshold / (1 - threshold))
    near = np.float32(limit)
    other = np.nextafter(near, np.float32(0 if float(near) < limit else -9))
    low, high = sorted((near, other))
    assert float(low) < limit < float(high)
    scores = torch.tensor([low, high]), torch.zeros(2, dtype=torch.bool)
    assert combined(torch.full((2,), 7.0), *scores, threshold).tolist() == [float(low), 7.0]


def test_rows_decide_one_by_one_and_huge_scores_keep_their_order():
    helpfulness, safety = torch.tensor([0.0, 0.0, 30.0, 40.0]), torch.tensor([50.0, 60.0, 3.0, -90.0])
    found = combined(helpfulness, safety, torch.tensor([True, True, False, False]))
    assert found.tolist() == [50.0, 60.0, 30.0, -90.0]  # through a sigmoid the first two would have become equal
    assert torch.tensor([50.0, 60.0]).sigmoid().tolist() == [1.0, 1.0]


def test_another_threshold_and_no_safety_model():
    scores = torch.tensor([HELPFUL] * 2), torch.tensor([-0.5, 0.5]), torch.tensor([False, False])
    assert combined(*scores, threshold=0.5).tolist() == [-0.5, HELPFUL]
    tagged = combined(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), None, torch.tensor([True, False]))
    assert tagged.tolist() == [1.0, 2.0] and tagged.dtype == torch.float32
    for bad in (0.0, 1.0, -1.73, math.nan):
        with pytest.raises(ValueError, match="a probability between 0 and 1, not"):
            combined(*scores, threshold=bad)


def test_a_score_that_is_no_number_is_named():
    good, tags = torch.zeros(12), torch.zeros(12, dtype=torch.bool)
    bad = good.clone()
    bad[[3, 7]] = torch.tensor([math.nan, -math.inf])
    with pytest.raises(ValueError, match=r"2 of 12 safety scores are not finite \(rows 3, 7\): check the safety model"):
        combined(good, bad, tags)
    with pytest.raises(ValueError, match=r"2 of 12 helpfulness scores"):
        combined(bad, None, tags)
    with pytest.raises(ValueError, match=r"12 of 12 helpfulness scores .* \(rows 0, 1, 2, 3, 4, 5, 6, 7, …\)"):
        combined(good * math.nan, good, tags)


def test_whitened_scores_have_mean_0_and_deviation_1():
    x = draw(64, 1) * 4 - 7
    expected = (x.numpy() - x.numpy().mean()) / x.numpy().std()
    torch.testing.assert_close(whiten(x), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    narrow = whiten(x.float())
    assert narrow.dtype == torch.float32
    assert narrow.mean().item() == pytest.approx(0, abs=1e-6)
    assert narrow.std(correction=0).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("value", (0.0, 0.1, -1e6 / 3))
@pytest.mark.parametrize("n", (1, 2, 3, 7, 512))
def test_a_constant_batch_is_exactly_zero(n, value, dtype):
    assert torch.equal(whiten(torch.full((n,), value, dtype=dtype)), torch.zeros(n, dtype=dtype))


def test_rounding_noise_is_not_blown_up_and_nothing_stays_nothing():
    x = torch.full((8,), 2.0)
    x[3] = torch.nextafter(x[3], torch.tensor(3.0))
    assert whiten(x).abs().max() < 0.01
    assert whiten(torch.empty(0)).shape == (0,)


def test_whitening_is_of_the_batch_and_not_of_each_rank():
    x = draw(8, 2)
    halves = torch.cat([whiten(x[:4]), whiten(x[4:])])
    assert (whiten(x) - halves).abs().max() > 0.05
    back = torch.arange(7, -1, -1)
    torch.testing.assert_close(whiten(x[back])[back], whiten(x), rtol=1e-12, atol=1e-12)  # no order among ranks


def test_score_and_penalty_by_hand():
    """The first answer has ended with EOS, its third token; the second was cut off after two tokens without one."""
    log_probs, reference = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0]), torch.tensor([-1.5, -1.0, -0.5, -3.5, -3.0])
    found = token_rewards(torch.tensor([2.0, -1.0]), log_probs, reference, (0, 3, 5), beta=0.5)
    assert found.tolist() == [-0.25, 0.5, 2.0, -0.25, -1.0 - 1.0]


def test_a_score_of_zero_is_a_score():
    """Whitened against the others it is no different from any: the row's sum is its penalty alone."""
    same = torch.zeros(4)
    assert token_rewards(torch.tensor([0.0, 3.0]), same, same, (0, 2, 4), 0.1).tolist() == [0.0, 0.0, 0.0, 3.0]
    assert combined(torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([False])).tolist() == [0.0]
    assert combined(torch.tensor([5.0]), torch.tensor([0.0]), torch.tensor([True])).tolist() == [0.0]


def test_against_loops_over_rows():
    bounds = (0, 3, 4, 9)
    scores, log_probs, reference = draw(3, 3), draw(9, 4), draw(9, 5)
    found = token_rewards(scores, log_probs, reference, bounds, 0.02)
    for row, (lo, hi) in enumerate(pairwise(bounds)):
        for t in range(lo, hi):
            expected = -0.02 * (log_probs[t] - reference[t]) + (scores[row] if t == hi - 1 else 0)
            assert found[t].item() == pytest.approx(expected.item(), rel=1e-13)
    assert token_rewards(scores.bfloat16(), log_probs.float(), reference.float(), bounds, 0.02).dtype == torch.float32
    with pytest.raises(ValueError, match=r"1 of 3 answers have no token \(row 0 first\)"):
        token_rewards(scores, log_probs, reference, (0, 0, 4, 9), 0.02)


def test_beta_scales_the_penalty_and_leaves_the_whitened_score_alone():
    bounds, log_probs, reference = (0, 3, 4, 9), draw(9, 6), draw(9, 7)
    scores = whiten(draw(3, 8))
    none, once, twice = (token_rewards(scores, log_probs, reference, bounds, beta) for beta in (0.0, 0.1, 0.2))
    torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-12, atol=1e-12)
    ends = torch.tensor([2, 3, 8])
    assert torch.equal(none[ends], scores) and not none[[0, 1, 4, 5, 6, 7]].any()


def test_the_expected_penalty_is_minus_beta_times_the_exact_kl():
    """All answers of a vocabulary of three, weighted by the policy: its sign and its size."""
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    kl = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    found = token_rewards(torch.zeros(3).double(), policy.log(), reference.log(), (0, 1, 2, 3), 0.3)
    assert (policy * found).sum().item() == pytest.approx(-0.3 * kl, rel=1e-12) and kl > 0
