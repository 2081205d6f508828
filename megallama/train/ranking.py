"""Reward models: the loss that ranks two answers to one prompt, and how well a model's scores agree with people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.data import RATINGS
from megallama.data.batch import Batch

MARGINS: dict[str, dict[str, float]] = {
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}
"""Margin of each rating, strongest first (Llama 2 paper, section 3.2.2 and table 27)."""


def margin_of(rating: str | None, margin: float | None, kind: str) -> float:
    """By how much the chosen answer's score is to exceed the other's before the loss is at ease.

    Kind "none" is the plain ranking loss: 0 for every pair. Otherwise a pair's own margin, 0.0 included, goes before
    its rating's, and a pair with neither has margin 0.

    Raises:
        ValueError: the kind or the rating is unknown, or the margin is not finite.
    """
    if kind not in MARGINS:
        raise ValueError(f"the margin {kind!r} is unknown; choose one of {', '.join(MARGINS)}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"a pair's margin is {margin}; it must be a finite number")
    if rating is not None:
        _check_rating(rating)
    if kind == "none":
        return 0.0
    if margin is not None:
        return float(margin)
    return 0.0 if rating is None else MARGINS[kind][rating]


def _check_rating(rating: str) -> None:
    if rating not in RATINGS:
        raise ValueError(f"the rating {rating!r} is unknown; choose one of {', '.join(RATINGS)}")


@dataclass(frozen=True)
class RankingLoss:
    """Sum over pairs of -log sigma(c - r - margin), c and r the scores of the chosen and the rejected answer.

    Reads `batch.extras`, for the n pairs of a micro-batch:
        ends: int64 (2n,), the place of each row's last token, where its score is read; rows chosen, rejected, chosen …
        margin: (n,).
        safe: (2n,), 1 for a safe answer, 0 for an unsafe one, nan where nobody said; read if safety_weight is not 0.

    The auxiliary safety loss, which the paper names but does not print, is the binary cross-entropy of sigma(score)
    against `safe`. It is summed over the rows with a label and halved: since losses are divided by pairs and a pair
    has two rows, that makes it a mean over rows.
    """

    safety_weight: float = 0.0

    def __call__(self, values: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (T, 1) of all tokens -> (sum over pairs, sums over pairs of the metrics); a tie is half right."""
        extras = batch.extras
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        scores = values[extras["ends"], 0].view(-1, 2)
        chosen, rejected = scores.unbind(1)
        lead = chosen - rejected
        loss = -F.logsigmoid(lead - extras["margin"].to(lead.dtype)).sum()
        known = lead.detach()
        metrics = {
            "reward_accuracy": ((known > 0).to(known.dtype) + 0.5 * (known == 0)).sum(),
            "reward_margin": known.sum(),
            "reward_chosen": chosen.detach().sum(),
            "reward_rejected": rejected.detach().sum(),
        }
        if self.safety_weight:
            safety = _safety_loss(scores.view(-1), extras["safe"])
            loss = loss + self.safety_weight * safety
            metrics["safety_loss"] = safety.detach()
        return loss, metrics


def _safety_loss(scores: Tensor, safe: Tensor) -> Tensor:
    """Half the sum over rows of the binary cross-entropy of sigma(score) (2n,) against 1, 0 or nan = no label."""
    safe = safe.to(scores.dtype)
    each = F.binary_cross_entropy_with_logits(scores, safe.nan_to_num(0), reduction="none")
    return each.masked_fill(safe.isnan(), 0).sum() / 2


class Judged(NamedTuple):
    """A reward model's verdict on one pair: score of the chosen answer minus the rejected one's, and people's rating.

    Attributes:
        source: where the pair comes from.
    """

    difference: float
    rating: str | None
    source: str


def accuracy_by_rating(judged: Sequence[Judged]) -> dict[str, tuple[float, int]]:
    """(share of pairs ranked as people did, pairs) of each rating, strongest first, then "unrated" and "all".

    A tie is half right. Ratings without a pair are left out; "all" without any is (nan, 0).

    Raises:
        ValueError: a rating is unknown or a difference is not finite.
    """
    _check_finite(judged)
    groups: dict[str, list[float]] = {rating: [] for rating in (*RATINGS, "unrated")}
    for pair in judged:
        if pair.rating is not None:
            _check_rating(pair.rating)
        groups["unrated" if pair.rating is None else pair.rating].append(_right(pair.difference))
    table = {name: (sum(right) / len(right), len(right)) for name, right in groups.items() if right}
    everything = [right for group in groups.values() for right in group]
    return {**table, "all": (sum(everything) / len(everything) if everything else math.nan, len(everything))}


class Bin(NamedTuple):
    """Pairs whose predicted probability lies in [lo, hi) (the last bin: [lo, hi]).

    Attributes:
        predicted: mean probability the model gives to people preferring the answer that it prefers itself.
        accuracy: how often they did.
    """

    lo: float
    hi: float
    n: int
    predicted: float
    accuracy: float


def calibration(judged: Sequence[Judged], bins: int = 10) -> list[Bin]:
    """Predicted against real agreement. The probability is sigma(|difference|), so bins cut [0.5, 1] evenly; those
    without a pair are left out. A tie predicts 0.5 and is half right.

    Raises:
        ValueError: a difference is not finite, or there is no bin.
    """
    if bins < 1:
        raise ValueError(f"calibration needs at least 1 bin, not {bins}")
    _check_finite(judged)
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for pair in judged:
        predicted = 1 / (1 + math.exp(-abs(pair.difference)))
        held[min(bins - 1, int((predicted - 0.5) * 2 * bins))].append((predicted, _right(pair.difference)))
    edges = [0.5 + n / (2 * bins) for n in range(bins + 1)]
    rows = []
    for n, pairs in enumerate(held):
        if pairs:
            predicted, right = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            rows.append(Bin(edges[n], edges[n + 1], len(pairs), predicted, right))
    return rows


def expected_calibration_error(rows: Sequence[Bin]) -> float:
    """Mean over pairs of |accuracy - predicted| of their bin; nan without a pair."""
    total = sum(row.n for row in rows)
    return sum(row.n * abs(row.accuracy - row.predicted) for row in rows) / total if total else math.nan


def _right(difference: float) -> float:
    return 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0


def _check_finite(judged: Sequence[Judged]) -> None:
    bad = [n for n, pair in enumerate(judged) if not math.isfinite(pair.difference)]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(judged)} score differences are not finite (pair {bad[0]} first): "
            "the reward model is damaged or has diverged"
        )
