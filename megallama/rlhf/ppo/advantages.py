"""Generalised advantage estimation over ragged rows, and whitening by moments that may be summed over ranks first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

LEAST_SPREAD = 1e-4
"""A standard deviation below this counts as this: what separates nearly equal numbers is rounding, not a signal."""


def row_ends(bounds: Sequence[int], x: Tensor) -> Tensor:
    """(rows,) place of each row's last token in the flat (N,) tensor `x`, on its device.

    Raises:
        ValueError: a row is empty: it has no token that could take its score.
    """
    assert bounds[0] == 0 and bounds[-1] == x.numel(), f"bounds {bounds[0]} … {bounds[-1]} of {x.numel()} tokens"
    empty = [row for row, (lo, hi) in enumerate(pairwise(bounds)) if hi <= lo]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(bounds) - 1} answers have no token (row {empty[0]} first); leave them out"
        )
    return torch.tensor(bounds[1:], dtype=torch.int64, device=x.device) - 1


def gae(rewards: Tensor, values: Tensor, bounds: Sequence[int], gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages A_t = sum over l >= 0 of (gamma lam)^l delta_(t+l) inside each row, and returns A_t + V_t, both (N,).

    delta_t = r_t + gamma V_(t+1) - V_t (Schulman et al. 2016, equation 16). V behind a row's last token is 0, after EOS
    and after the length limit alike: the score has been paid on that token, so nothing is left to come.

    Args:
        rewards, values: (N,) of all answer tokens, rows back to back; V_t is the value before token t is chosen.
        bounds: 0 = b0 < b1 < … < bn = N, the rows.

    Raises:
        ValueError: a row is empty.
    """
    ends = row_ends(bounds, rewards)
    wide = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.to(wide), values.to(wide)
    following = values.roll(-1)
    following[ends] = 0
    advantages = rewards + gamma * following - values
    lengths = [hi - lo for lo, hi in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends, live = ends[torch.tensor(order, dtype=torch.int64, device=ends.device)], len(order)
    for back in range(1, max(lengths, default=0)):  # all rows at once, each from its own end; the longest come first
        while lengths[order[live - 1]] <= back:
            live -= 1
        at = ends[:live] - back
        advantages[at] += gamma * lam * advantages[at + 1]
    return advantages, advantages + values


def moments(x: Tensor) -> Tensor:
    """(3,) fp64: sum, sum of squares and count of `x`. Those of several ranks' parts add up to those of the whole."""
    x = x.double()
    return torch.stack((x.sum(), x.square().sum(), torch.tensor(float(x.numel()), dtype=x.dtype, device=x.device)))


def whiten_by(x: Tensor, total: Tensor) -> Tensor:
    """`x` minus the mean, over the population's standard deviation (at least LEAST_SPREAD), both of `total`.

    Args:
        x: any part of the whole, as a rank's own tokens.
        total: moments of the whole: summed over dp, the result does not depend on how the batch was cut.
    """
    mean, square = total[:2] / total[2]
    spread = (square - mean.square()).clamp_min(0).sqrt().clamp_min(LEAST_SPREAD)
    return ((x.double() - mean) / spread).to(torch.promote_types(x.dtype, torch.float32))
