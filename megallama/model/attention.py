"""Causal grouped-query attention inside document bounds. K and V are never expanded to the number of query heads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def runs(bounds: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(first token, spans, length) of every run of consecutive spans of equal length: each is one dense call."""
    at = 0
    for length, group in groupby(hi - lo for lo, hi in pairwise(bounds)):
        count = len(list(group))
        yield at, count, length
        at += count * length


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim), causal inside each span) v.

    Args:
        q: (T, heads, head_dim). Query head h reads key/value head h // (heads / kv heads).
        k, v: (T, kv heads, head_dim).
        bounds: 0 = b0 < b1 < … < bn = T; tokens b_i … b_i+1 - 1 attend to each other alone.

    Returns:
        (T, heads * head_dim).
    """
    out = []
    for at, spans, length in runs(bounds):
        qd, kd, vd = (x[at : at + spans * length].unflatten(0, (spans, length)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out.append(y.transpose(1, 2).reshape(spans * length, -1))
    return out[0] if len(out) == 1 else torch.cat(out)
