"""Flat memory for consecutive parameters of one stage, split evenly over data-parallel ranks (ZeRO-1).

Parameters are views of one flat weight buffer and their gradients accumulate in one flat buffer of at least fp32. Each
dp rank owns one shard: its master weights and both AdamW moments. The shard length is a multiple of 64 elements, so
dp need not divide anything, reductions work on views without copies, and a vectorised optimizer sees no ragged tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megallama.parallel.collectives import Pending, all_reduce, start_all_gather, start_reduce_scatter
from megallama.parallel.grads import Target
from megallama.parallel.pieces import Piece, Slot, cut, matrix, spans
from megallama.runtime.mesh import Mesh

ALIGN = 64


class Held(NamedTuple):
    """A local parameter and the canonical rectangles in it."""

    weight: nn.Parameter
    pieces: list[Piece]


class Range(NamedTuple):
    """Elements lo:hi of flat memory."""

    lo: int
    hi: int


class Bucket:
    """Weights, gradients and optimizer state of `held` parameters.

    Attributes:
        master: (shard,) this rank's weights in accumulation precision; a view of the weights where those have it.
        exp_avg, exp_avg_sq: (shard,) AdamW's moments.
        slots: canonical rectangles in the shard.
        decayed: ranges of the shard under weight decay (matrices; not norms or biases).
        owned: ranges of the shard that this rank counts in the gradient norm.
        partial: name of an axis -> ranges of the shard whose gradient is a part, to be summed over that axis.
    """

    def __init__(self, held: list[Held], mesh: Mesh):
        self.held, self.mesh = held, mesh
        first, numel = held[0].weight, sum(h.weight.numel() for h in held)
        self.size = -(-numel // (mesh.dp.size * ALIGN)) * ALIGN
        total, wide = self.size * mesh.dp.size, torch.promote_types(first.dtype, torch.float32)
        self.weights = torch.zeros(total, dtype=first.dtype, device=mesh.device)
        self.grads = torch.zeros(total, dtype=wide, device=mesh.device)
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.size, dtype=wide, device=mesh.device) for _ in range(2))
        mine = self._shard(self.weights)
        self.master = mine if mine.dtype == wide else mine.to(wide)
        self.slots: list[Slot] = []
        decayed: list[Range] = []
        owned: list[Range] = []
        partial: dict[str, list[Range]] = {}
        for (weight, held_pieces), start in zip(held, self._starts(), strict=True):
            weight.data = self.weights[start : start + weight.numel()].view_as(weight)
            for piece in held_pieces:
                slots = list(self._cut(piece, matrix(tuple(weight.shape))[1], start, weight.numel()))
                self.slots += slots
                ranges = [_span(slot) for slot in slots]
                decayed += ranges if weight.ndim > 1 else []
                owned += [_span(slot) for slot in slots if slot.owner]
                if piece.partial:
                    partial.setdefault(piece.replicas, []).extend(ranges)
        self.decayed, self.owned = _merge(decayed), _merge(owned)
        self.partial = {name: _merge(ranges) for name, ranges in partial.items()}
        self.left = 0
        self._reducing: Pending | None = None
        self._gathering: Pending | None = None

    def _starts(self) -> list[int]:
        sizes = [h.weight.numel() for h in self.held]
        return [sum(sizes[:n]) for n in range(len(sizes))]

    def _shard(self, flat: Tensor) -> Tensor:
        return flat[self.mesh.dp.rank * self.size :][: self.size]

    def _cut(self, piece: Piece, cols: int, start: int, numel: int) -> Iterator[Slot]:
        """Slots of one piece of a parameter (`numel` elements from `start` of the flat buffer) in this rank's shard."""
        origin = self.mesh.dp.rank * self.size
        owner = {name: self.mesh.replicas(name).rank == 0 for name in ("", "tp", "kv", "tied")}
        lo, hi = max(0, origin - start), min(numel, origin + self.size - start)
        for window in spans(lo, hi, cols):
            yield from cut([piece], cols, window, start - origin + window.r0 * cols + window.c0, owner)

    def buffers(self) -> list[Tensor]:
        """For each parameter its view of the gradient buffer."""
        return [
            self.grads[start : start + h.weight.numel()].view_as(h.weight)
            for h, start in zip(self.held, self._starts(), strict=True)
        ]

    def reduce(self, targets: Iterable[Target]) -> None:
        """Start the reduce-scatter over dp. Later calls of a step do nothing."""
        if self._reducing is not None:
            return
        for target in targets:
            if target.fresh:  # nothing arrived in this step: what lies there is the last step's
                target.buffer.zero_()
        self._reducing = start_reduce_scatter(self.grads, self.mesh.dp)

    def gradient(self) -> Tensor:
        """This rank's shard (size,) of the gradient, summed over dp and then over replicas. Collective.

        Replicas come last because their copies must keep the same bits: one reduction hands all of them the same sum,
        whereas several reduce-scatters over dp, one for each copy, may add up in different orders.
        """
        assert self._reducing is not None, "reduce() comes before gradient()"
        shard, self._reducing = self._reducing.wait(), None
        for name in self.partial:
            self._sum_replicas(shard, name)
        return shard

    def _sum_replicas(self, shard: Tensor, name: str) -> None:
        axis, parts = self.mesh.replicas(name), [shard[lo:hi] for lo, hi in self.partial[name]]
        if axis.size == 1 or not parts:
            return
        if len(parts) == 1:
            all_reduce(parts[0], axis)
            return
        total = all_reduce(torch.cat(parts), axis)
        for part, summed in zip(parts, total.split([p.numel() for p in parts]), strict=True):
            part.copy_(summed)

    def publish(self) -> None:
        """Cast this rank's masters to weights and start gathering everyone's."""
        self.ready()  # a gather that nobody waited for still writes to the weights
        mine = self._shard(self.weights)
        if mine.data_ptr() != self.master.data_ptr():
            mine.copy_(self.master)
        self._gathering = start_all_gather(mine, self.mesh.dp, self.weights)

    def ready(self) -> None:
        """Wait until the weights are complete."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


def _span(slot: Slot) -> Range:
    """A slot as one range: whole rows, or a part of one row."""
    assert slot.rect.height == 1 or slot.rect.width == slot.stride, f"{slot} is not contiguous"
    return Range(slot.start, slot.start + slot.rect.area)


def _merge(ranges: list[Range]) -> list[Range]:
    """Sorted ranges with neighbours joined."""
    out: list[Range] = []
    for lo, hi in sorted(ranges):
        if out and out[-1].hi == lo:
            out[-1] = Range(out[-1].lo, hi)
        else:
            out.append(Range(lo, hi))
    return out
