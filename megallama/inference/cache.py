"""Keys and values of the tokens before, so that a new token costs one token's work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.model.attention import attention
from megallama.model.llama import Block, Stage

ALIGN = 16
"""Tokens to whose multiple a length is rounded up: what GPU kernels ask of a mask's rows."""


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that nobody holds; the host gives out memory as it is touched, and has no such bound."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _first_block(stages: Sequence[Stage]) -> Block:
    return cast(Block, next(block for stage in stages for block in stage.blocks))


def aligned(length: int) -> int:
    return -(-length // ALIGN) * ALIGN


class KVCache:
    """Keys and values of up to `rows` sequences of up to `length` tokens, in the blocks of some of this rank's stages.

    One tensor (blocks, 2, rows, kv heads, length, head_dim) in the compute dtype, of this tp rank's K/V heads; they
    are never expanded to the number of query heads. It starts from zeros: what is masked must still be finite.
    """

    def __init__(self, stages: Iterable[Stage], rows: int, length: int):
        stages = list(stages)
        self.blocks = {n: at for at, n in enumerate(n for s in stages for n in range(s.span.first, s.span.last))}
        first = _first_block(stages)
        self.heads, self.length = first.core.kv_heads, aligned(length)
        shape = (len(self.blocks), 2, rows, self.heads, self.length, stages[0].model.head_dim)
        weight = first.qkv.weight
        self.store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    @staticmethod
    def row_bytes(stages: Iterable[Stage], length: int) -> int:
        """Bytes of one row."""
        stages = list(stages)
        first, blocks = _first_block(stages), sum(len(stage.blocks) for stage in stages)
        numbers = 2 * blocks * first.core.kv_heads * aligned(length) * stages[0].model.head_dim
        return numbers * first.qkv.weight.element_size()

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of row `source` to row `target`."""
        self.store[:, :, target, :, :tokens] = self.store[:, :, source, :, :tokens]

    def places(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(n,) rows and positions -> (n * kv heads,) where their keys lie among a block's (…, head_dim)."""
        heads = torch.arange(self.heads)
        return ((rows[:, None] * self.heads + heads) * self.length + positions[:, None]).flatten()


@dataclass
class CachedPass:
    """What one forward pass does with the cache: some rows go on by a token each, and prompts enter.

    Attributes:
        wanted: (n,) the tokens whose logits are wanted.
        stored: (m,) the tokens that are kept; one may be kept in several rows.
        places: (m * kv heads,) where.
        mask: (rows, 1, 1, tokens) what is added to the scores of the rows that go on, rows 0, 1, … of the cache and
            first in the pass.
        bounds: of the prompts and the padding behind them, counted from the first prompt: each attends to itself.
    """

    cache: KVCache
    wanted: Tensor
    stored: Tensor
    places: Tensor
    mask: Tensor
    bounds: tuple[int, ...]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, heads, head_dim), k and v (T, kv heads, head_dim) of block `layer` -> (T, heads * head_dim)."""
        store = self.cache.store[self.cache.blocks[layer]]
        for fresh, kept in ((k, store[0]), (v, store[1])):
            kept.view(-1, kept.shape[-1]).index_copy_(0, self.places, fresh[self.stored].flatten(0, 1))
        rows, tokens = self.mask.shape[0], self.mask.shape[3]
        out = []
        if rows:
            # The query heads of one K/V head are the queries of one small attention: nothing is expanded.
            grouped = q[:rows].unflatten(1, (self.cache.heads, -1))
            keys, values = store[:, :rows, :, :tokens]
            out.append(F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).flatten(1))
        if self.bounds[-1]:
            out.append(attention(q[rows:], k[rows:], v[rows:], self.bounds))
        return out[0] if len(out) == 1 else torch.cat(out)
