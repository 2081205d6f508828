"""Which sample comes i-th: computed in O(1) from (seed, i), with no shuffle to build, store or resume.

All functions take an integer or an array of integers and are exact integer arithmetic, so every machine and every
layout of ranks gets the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

U = np.uint64
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: Weyl increments that stay far apart
SHARE_BITS = 30
MOST_SAMPLES = 1 << (62 - SHARE_BITS)  # index times share stays below 2**62


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words with full avalanche."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return x ^ (x >> U(31))


def key(*words: ArrayLike) -> np.ndarray:
    """A 64-bit key from integers or arrays of them (seed, source, epoch, …); uint64, broadcast over the words."""
    k = np.zeros((), U)
    with np.errstate(over="ignore"):
        for word in words:
            k = mix((k ^ np.asarray(word).astype(np.int64).astype(U)) + U(GOLDEN))
    return k


def permute(i: ArrayLike, n: int, k: ArrayLike) -> np.ndarray:
    """pi_k(i), a pseudo-random bijection of [0, n), for 0 <= i < n <= 2**62.

    A Feistel network on the a x b grid that is just larger than n (a = ceil(sqrt n), a*b - n < a), walked until it
    lands below n (Black and Rogaway 2002): 1 + O(1/sqrt n) evaluations on average.

    Args:
        i: positions, any shape.
        k: one key, or an array of keys shaped like i.

    Returns:
        int64, shaped like i.
    """
    i = np.array(i, U)
    shape, i = i.shape, i.reshape(-1)
    k = np.broadcast_to(np.asarray(k, U), shape).reshape(-1)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    # A small grid has few bits a half, so it takes more rounds until all orders are about equally likely.
    rounds = 16 if n < 64 else 8

    def below(x: np.ndarray, m: int) -> np.ndarray:
        """The upper half of each word, scaled to [0, m) by a multiplication instead of a division; m <= 2**31."""
        return ((x >> U(32)) * U(m)) >> U(32)

    def walk(x: np.ndarray, k: np.ndarray) -> np.ndarray:
        left, right = x // U(b), x % U(b)
        with np.errstate(over="ignore"):
            for r in range(rounds):
                word = k + U(r * GOLDEN % 2**64)
                if r % 2 == 0:
                    left = left + below(mix(right + word), a)
                    left -= (left >= U(a)) * U(a)
                else:
                    right = right + below(mix(left + word), b)
                    right -= (right >= U(b)) * U(b)
        return left * U(b) + right

    x = walk(i, k)
    out = np.flatnonzero(x >= U(n))
    while out.size:
        x[out] = walk(x[out], k[out])
        out = out[x[out] >= U(n)]
    return x.astype(np.int64).reshape(shape)


class Blend:
    """Sample i of a weighted blend -> (source, index inside that source): every prefix is within two samples of exact.

    A binary tree over the sources; of the m samples that reach a node, floor(m p + 1/2) go left. Both children then
    count without gaps, so the index inside a source is 0, 1, 2, … and the inverse needs no search.

    Why two: a rounding of at most 1/2 at a node's child c reaches a leaf scaled by w_leaf / w_c. In a Huffman tree a
    node's grandparent weighs at least twice as much as the node (its uncle was merged later, so it is no lighter),
    hence the sum is at most 1/2 (1 + 1 + 1/2 + 1/2 + 1/4 + …) = 2. Shares are kept in 2**-30: another sample in 10**9.

    Args:
        weights: one positive number a source; only their ratios matter.

    Raises:
        ValueError: no source, or a weight that is not a positive number.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights:
            raise ValueError("data.sources is empty: name at least one source, {prefix: PATH, weight: 1.0}")
        for s, weight in enumerate(weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"weight {weight} of source {s} is no positive number; remove the source or raise it")
        # Leaf s is node -1 - s, inner nodes count from 0: sorting by (weight, node) makes the tree unique.
        heap = [(float(w), -1 - s) for s, w in enumerate(weights)]
        shares: list[int] = []
        children: list[tuple[int, int]] = []
        while len(heap) > 1:
            heap.sort(reverse=True)
            (light, right), (heavy, left) = heap.pop(), heap.pop()
            share = round(heavy / (light + heavy) * (1 << SHARE_BITS))
            shares.append(min(share, (1 << SHARE_BITS) - 1))
            children.append((left, right))
            heap.append((light + heavy, len(shares) - 1))
        self._root = heap[0][1]
        self._share = np.array([*shares, 0], np.int64)
        self._children = np.array([*children, (0, 0)], np.int64)

    def __call__(self, i: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(source, index), two int64 arrays (n,), of samples i (n,) or of one sample.

        Raises:
            ValueError: i is negative or 2**32 and more.
        """
        index = np.array(i, np.int64, ndmin=1)
        if index.size and not 0 <= index.min() <= index.max() < MOST_SAMPLES:
            raise ValueError(f"samples {index.min()} to {index.max()}: a run has samples 0 to {MOST_SAMPLES - 1}")
        node = np.full(index.shape, self._root)
        live = np.flatnonzero(node >= 0)
        half = 1 << (SHARE_BITS - 1)
        while live.size:
            at, seen = node[live], index[live]
            left = (seen * self._share[at] + half) >> SHARE_BITS
            goes_right = ((seen + 1) * self._share[at] + half) >> SHARE_BITS == left
            index[live] = np.where(goes_right, seen - left, left)
            node[live] = self._children[at, goes_right.astype(np.int64)]
            live = live[node[live] >= 0]
        return -1 - node, index


class Places(NamedTuple):
    """Where samples come from; int64 arrays (n,): `position` is the sample's place in its source's own order."""

    source: np.ndarray
    epoch: np.ndarray
    position: np.ndarray


class Order:
    """Sample i of the run -> (source, epoch, position), each source in a fresh order every epoch.

    Args:
        weights: one positive number a source.
        sizes: samples of each source in one epoch.
        seed: of the run.
    """

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int):
        self.blend, self.sizes, self.seed = Blend(weights), tuple(sizes), seed

    def __call__(self, i: ArrayLike) -> Places:
        source, index = self.blend(i)
        epoch, position = np.empty_like(index), np.empty_like(index)
        for s in np.unique(source):
            mine = source == s
            epoch[mine], place = np.divmod(index[mine], self.sizes[s])
            position[mine] = permute(place, self.sizes[s], key(self.seed, s, epoch[mine]))
        return Places(source, epoch, position)
