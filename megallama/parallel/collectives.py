"""Sums and gathers over one Axis. An axis of one rank returns its input.

Gathers concatenate over dim 0 in rank order and reduce-scatters split dim 0; both come as `start_*` (returns a Pending)
so that work can go on meanwhile. NCCL has native operations; gloo's own reduce-scatter and all-gather are several times
slower than the same bytes sent point to point, so on gloo they are written with isend and irecv. Sums run in rank
order: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.runtime.mesh import Axis

# PyTorch renamed both in 2.13 and warns at every call of the old name.
_native_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way; `wait` returns its result and may be called once."""

    def __init__(self, works: Iterable[dist.Work | None], finish: Callable[[], Tensor]):
        self._works, self._finish = [work for work in works if work is not None], finish

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._finish()


def _point_to_point(group: dist.ProcessGroup) -> bool:
    return dist.get_backend(group) == "gloo"


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over the axis, in place; never call it on a gradient that autograd may still read."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def start_all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """Concatenation over dim 0 of every rank's `x` (n, …) -> (size * n, …).

    Args:
        out: where the result goes; `x` may be this rank's own part of it.
    """
    if axis.size == 1:
        return Pending((), lambda: x)
    assert axis.group is not None, "an axis of several ranks needs a process group"
    x = x.contiguous()
    if out is None:
        out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    full = out
    if not _point_to_point(axis.group):
        return Pending([_native_gather(full, x, group=axis.group, async_op=True)], lambda: full)
    parts = full.chunk(axis.size)
    if parts[axis.rank].data_ptr() != x.data_ptr():
        parts[axis.rank].copy_(x)
    works = []
    for peer in range(axis.size):
        if peer != axis.rank:
            works.append(dist.irecv(parts[peer], group=axis.group, group_src=peer))
            works.append(dist.isend(x, group=axis.group, group_dst=peer))
    return Pending(works, lambda: full)


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """This rank's part (n / size, …) of the sum over ranks of `x` (n, …). `x` must stay unchanged until `wait`."""
    if axis.size == 1:
        return Pending((), lambda: x)
    assert axis.group is not None, "an axis of several ranks needs a process group"
    x = x.contiguous()
    mine = x.chunk(axis.size)
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} rows cannot be split over {axis.size} ranks"
    if not _point_to_point(axis.group):
        out = torch.empty_like(mine[axis.rank])
        return Pending([_native_reduce_scatter(out, x, group=axis.group, async_op=True)], lambda: out)
    parts = [part if rank == axis.rank else torch.empty_like(part) for rank, part in enumerate(mine)]
    works = []
    for peer in range(axis.size):
        if peer != axis.rank:
            works.append(dist.irecv(parts[peer], group=axis.group, group_src=peer))
            works.append(dist.isend(mine[peer], group=axis.group, group_dst=peer))

    def total() -> Tensor:
        out = parts[0] + parts[1]
        for part in parts[2:]:
            out += part
        return out

    return Pending(works, total)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """`start_all_gather`, waited for."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """`start_reduce_scatter`, waited for."""
    return start_reduce_scatter(x, axis).wait()
