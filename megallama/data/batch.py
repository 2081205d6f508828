"""One micro-batch, as every rank of a data-parallel replica sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that carries no loss (HF's and PyTorch's convention)."""


class Cache(Protocol):
    """Keys and values of earlier tokens: what generation puts in the place of attention inside `bounds`.

    Attributes:
        wanted: (n,) the places whose logits are wanted.
    """

    wanted: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, heads, head_dim), k and v (T, kv heads, head_dim) of block `layer` -> (T, heads * head_dim)."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of T tokens: its samples' rows back to back, padded to a multiple of the tensor-parallel size.

    Attributes:
        tokens: int64 (T,), ids.
        labels: int64 (T,), the token to predict at each place, or IGNORE.
        positions: int64 (T,), rotary position of each token.
        bounds: offsets 0 = b0 < b1 < … < bn = T; attention is causal and stays inside each [b_i, b_i+1).
        count: what the loss is divided by, summed over the global batch: labels that are not IGNORE, or pairs.
        extras: what a stage's own loss reads beside the labels.
        cache: of a generation, else None.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    bounds: tuple[int, ...]
    count: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    cache: Cache | None = None

    @property
    def length(self) -> int:
        return self.tokens.numel()

    @staticmethod
    def pack(
        rows: list[tuple[Tensor, Tensor]], multiple: int = 1, document_starts: list[list[int]] | None = None
    ) -> Batch:
        """Rows of (tokens, labels), each a span that attends to itself alone, back to back.

        `document_starts[i]` cuts row i further: offsets (without 0) at which a new document begins. The padding up to
        a multiple of `multiple` is one more span, of token 0 and label IGNORE.
        """
        bounds, positions = [0], []
        for n, (tokens, _) in enumerate(rows):
            starts = [0, *(document_starts[n] if document_starts else ()), tokens.numel()]
            for lo, hi in pairwise(starts):
                positions.append(torch.arange(hi - lo))
                bounds.append(bounds[-1] + hi - lo)
        pad = -bounds[-1] % multiple
        tokens = torch.cat([*(t for t, _ in rows), torch.zeros(pad, dtype=torch.int64)])
        labels = torch.cat([*(x for _, x in rows), torch.full((pad,), IGNORE)])
        if pad:
            positions.append(torch.arange(pad))
            bounds.append(bounds[-1] + pad)
        return Batch(tokens, labels, torch.cat(positions), tuple(bounds), int((labels != IGNORE).sum()))

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        if self.tokens.device == device:
            return self
        tokens, labels, positions = (
            x.to(device, non_blocking=True) for x in (self.tokens, self.labels, self.positions)
        )
        extras = {name: x.to(device, non_blocking=True) for name, x in self.extras.items()}
        return replace(self, tokens=tokens, labels=labels, positions=positions, extras=extras)
