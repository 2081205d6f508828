"""One step of sampling against its definition, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallama.inference import sampling
from megallama.inference.sampling import Draw, Sampling, choose, controls


def kept(logits: list[float], s: Sampling) -> dict[int, float]:
    """Id -> probability of what top-k and top-p leave; the oracle."""
    top = max(logits)
    weights = [math.exp((x - top) / s.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: s.top_k or len(logits)]
    whole, reached, chosen = math.fsum(weights[i] for i in order), 0.0, []
    for i in order:
        chosen.append(i)
        reached += weights[i]
        if s.top_p < 1 and reached >= s.top_p * whole:
            break
    total = math.fsum(weights[i] for i in chosen)
    return {i: weights[i] / total for i in sorted(chosen)}


def draws(logits: Tensor, s: Sampling, numbers: range, seed: int = 5) -> Tensor:
    """Tokens of one row of logits (V,) at many places of an answer."""
    rows = [Draw(s, seed, n) for n in numbers]
    return choose(logits.repeat(len(rows), 1), controls(rows))[0]


LOGITS = st.lists(st.floats(-4, 4), min_size=2, max_size=90)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 0.99), st.booleans(), st.integers(1, 90))
def test_a_draw_is_the_inverse_of_the_running_sum(
    values: list[float], temperature: float, top_k: int, top_p: float, all_p: bool, width: int
) -> None:
    """The id is the first, ids ascending, at which the probabilities of what is left exceed the uniform number."""
    s = Sampling(temperature=temperature, top_k=top_k, top_p=1.0 if all_p else top_p)
    rows = [Draw(s, 11, n) for n in range(40)]
    given_width, sampling.WIDTH = sampling.WIDTH, width  # also where the first look does not suffice
    try:
        ids, _ = choose(torch.tensor(values, dtype=torch.float64).repeat(40, 1), controls(rows))
    finally:
        sampling.WIDTH = given_width
    left = kept(values, s)
    for token, u in zip(ids.tolist(), controls(rows)["uniform"].tolist(), strict=True):
        assert token in left
        below = math.fsum(p for i, p in left.items() if i < token)
        assert below - 1e-9 <= u <= below + left[token] + 1e-9


def test_tokens_come_as_often_as_they_are_probable() -> None:
    """Chi-square over 20000 draws; 27.9 is exceeded once in a thousand times with 9 degrees of freedom."""
    logits, count = torch.linspace(-1.5, 1.0, 10, dtype=torch.float64), 20_000
    for s in (Sampling(), Sampling(temperature=0.5), Sampling(top_k=4), Sampling(top_p=0.7)):
        expected = kept(logits.tolist(), s)
        seen = torch.bincount(draws(logits, s, range(count)), minlength=10).tolist()
        assert {i for i, n in enumerate(seen) if n} <= set(expected)
        assert sum((seen[i] - count * p) ** 2 / (count * p) for i, p in expected.items()) < 27.9


def test_neighbouring_seeds_and_numbers_are_independent() -> None:
    logits, s = torch.zeros(4, dtype=torch.float64), Sampling()
    answers = torch.stack([draws(logits, s, range(200), seed) for seed in range(20)])
    assert abs(float((answers[:-1] == answers[1:]).double().mean()) - 0.25) < 0.03
    assert abs(float((answers[:, :-1] == answers[:, 1:]).double().mean()) - 0.25) < 0.03


def test_equal_probabilities_count_by_id() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 0.0])
    assert set(draws(logits, Sampling(top_k=2), range(200)).tolist()) == {1, 2}
    share = math.exp(2) * 2 / (math.exp(2) * 4 + math.exp(1) + 1)
    assert set(draws(logits, Sampling(top_p=share - 1e-3), range(200)).tolist()) == {1, 2}
    assert set(draws(logits, Sampling(top_p=share + 1e-3), range(200)).tolist()) == {1, 2, 3}
    assert draws(logits, Sampling(temperature=0), range(1)).tolist() == [1]
    flat = torch.zeros(3 * sampling.WIDTH)  # more ties than are looked at first
    assert int(draws(flat, Sampling(top_k=sampling.WIDTH - 1), range(500)).max()) < sampling.WIDTH - 1


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draws(logits, Sampling(top_p=0.65), range(300)).tolist()) == {0, 1}
    assert set(draws(logits, Sampling(top_k=2, top_p=0.55), range(300)).tolist()) == {0}  # 0.4 / 0.7 > 0.55
    assert set(draws(logits, Sampling(top_k=3, top_p=1.0), range(300)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("vocab", [1, 7, 63, 64, 65, 500])
def test_log_probabilities_are_those_of_the_whole_softmax(vocab: int) -> None:
    """At the row's temperature, before top-k and top-p; at 1 where the temperature is 0."""
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, dtype=torch.float64, generator=random) * 3
    kinds = [Sampling(), Sampling(temperature=0), Sampling(temperature=0.3, top_k=2), Sampling(temperature=2.0)]
    kinds.append(Sampling(top_p=0.4))
    ids, found = choose(logits.clone(), controls([Draw(s, n, n) for n, s in enumerate(kinds)]))
    for row, (s, token) in enumerate(zip(kinds, ids.tolist(), strict=True)):
        expected = (logits[row] / (s.temperature or 1.0)).log_softmax(0)[token]
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-13)
    assert ids[1] == logits[1].argmax()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 130, dtype=torch.float64, generator=random)
    kinds = (Sampling(), Sampling(temperature=0), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(9, 0.7, 9, 0.9))
    rows = [Draw(kinds[n % len(kinds)], n, 3) for n in range(6)]
    together = choose(logits.clone(), controls(rows))
    for n in range(6):
        alone = choose(logits[n : n + 1].clone(), controls(rows[n : n + 1]))
        assert int(alone[0]) == int(together[0][n])
        assert float(alone[1]) == pytest.approx(float(together[1][n]), abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = (torch.randn(1, 4000, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    ids, found = choose(logits.clone(), controls([Draw(Sampling(), 1, 1)]))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(logits.double().log_softmax(1)[0, ids[0]]), abs=2e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -5.0])
    ids = draws(logits, Sampling(temperature=temperature), range(400))
    assert set(ids.tolist()) == ({1} if temperature < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("s", [Sampling(), Sampling(temperature=0), Sampling(top_k=3), Sampling(top_p=0.5)])
def test_logits_that_are_not_finite_are_told_by_nan(bad: float, s: Sampling) -> None:
    logits = torch.zeros(3, 70)
    logits[1, 33] = bad
    _, found = choose(logits, controls([Draw(s, n, 0) for n in range(3)]))
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5 must be 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": ("a", "")}, "stop=('a', '') must be texts that are not empty"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sampling(**values)
    assert words in str(caught.value)
