"""One epoch of records out of several sources, each with its share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .order import key, permute

SHUFFLE = -1
"""In the place of a source's number: the key of the order in which the sources are mixed."""

SLACK = 1 + 1e-12
"""For shares written as decimals, which are not exact: 7 records at 0.07 make an epoch of 100, not of 99."""


def mix(sizes: Sequence[int], shares: Sequence[float | None], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch in shuffled order: a pure function of (seed, epoch).

    A share of None takes each record of its source once. A share s takes the fraction s of the epoch: records drawn
    anew for each epoch, without replacement. Only where the source is smaller than its part does it go round again: no
    record then comes more than once oftener than another, and the shuffle gives every time round another order.

    How long an epoch is: with a None, so long that the others fill what the shares leave. Without, as long as the
    source that is scarcest for its share lasts, min(size / share), so that nothing is repeated.

    Args:
        sizes: records of each source, >= 1.
        shares: None, or 0 < s < 1; together below 1 where there is a None, else 1.

    Returns:
        (source, index), int64 (n,).

    Raises:
        ValueError: sizes or shares outside of these, or a share that is too small for a single record.
    """
    _check(sizes, shares)
    counts = _counts(sizes, shares)
    if empty := [s for s, count in enumerate(counts) if not count]:
        s = empty[0]
        raise ValueError(
            f"share {shares[s]} of source {s} is not one record in an epoch of {sum(counts)}; raise it, or leave the "
            "source out"
        )
    drawn = [permute(np.arange(n) % sizes[s], sizes[s], key(seed, epoch, s)) for s, n in enumerate(counts)]
    index = np.concatenate(drawn)
    source = np.repeat(np.arange(len(sizes)), counts)
    order = permute(np.arange(index.size), index.size, key(seed, epoch, SHUFFLE))
    return source[order], index[order]


def _check(sizes: Sequence[int], shares: Sequence[float | None]) -> None:
    if not sizes or len(sizes) != len(shares):
        raise ValueError(f"{len(sizes)} sources with {len(shares)} shares; give at least one source, each its share")
    for s, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if size < 1:
            raise ValueError(f"source {s} has {size} records; leave it out")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share {share} of source {s} is not between 0 and 1; give null to take each record once")
    total = sum(share for share in shares if share is not None)
    if None in shares and total >= 1:
        raise ValueError(f"the shares add up to {total:g} and leave nothing to those without one; lower them below 1")
    if None not in shares and not math.isclose(total, 1, rel_tol=1e-6):
        raise ValueError(f"the shares add up to {total:g}; make it 1, or give one source null to take it whole")


def _counts(sizes: Sequence[int], shares: Sequence[float | None]) -> list[int]:
    """Records that each source gives to an epoch."""
    if None in shares:
        whole = sum(size for size, share in zip(sizes, shares, strict=True) if share is None)
        length = whole / (1 - sum(share for share in shares if share is not None))
        return [size if share is None else round(share * length) for size, share in zip(sizes, shares, strict=True)]
    given = [share for share in shares if share is not None]
    given = [share / sum(given) for share in given]  # they add up to 1 but for their last decimals
    length = math.floor(min(size / share for size, share in zip(sizes, given, strict=True)) * SLACK)
    counts = [math.floor(share * length * SLACK) for share in given]
    # What rounding down left goes to those that lost most by it.
    missed = sorted(range(len(given)), key=lambda s: counts[s] - given[s] * length)
    for s in missed[: length - sum(counts)]:
        counts[s] += 1
    return counts
