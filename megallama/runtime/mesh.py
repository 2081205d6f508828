"""The mesh of ranks: one Axis for each way of splitting work. An axis of size 1 needs no process group."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Axis(NamedTuple):
    """One rank's view of a group of ranks; `group` is None for an axis of one rank, and in plans without processes."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1


ONE = Axis()


@dataclass(frozen=True)
class Mesh:
    """Rank order: tp fastest, then dp, then pp (Megatron's default).

    Attributes:
        pp, dp, tp: the three ways of splitting a run.
        kv: the consecutive tp ranks that hold copies of one K/V head (tp > num_key_value_heads).
        tied: the first and last pipeline ranks, which hold copies of a tied embedding.
        world: all ranks.
        forward, backward: the pp ranks again, one communicator for each direction of pipeline traffic
            (NCCL runs the transfers of one communicator in order).
        device: where this rank computes.
    """

    pp: Axis = ONE
    dp: Axis = ONE
    tp: Axis = ONE
    kv: Axis = ONE
    tied: Axis = ONE
    world: Axis = ONE
    forward: Axis = ONE
    backward: Axis = ONE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def replicas(self, name: str) -> Axis:
        """The axis whose ranks hold equal copies, by the name that a Piece gives it ("" = no copies)."""
        return {"": ONE, "tp": self.tp, "kv": self.kv, "tied": self.tied}[name]


def layout(rank: int, world: int, tp: int, pp: int) -> tuple[int, int, int]:
    """(pp, dp, tp) coordinates of a global rank.

    Raises:
        ValueError: tp * pp does not divide the world.
    """
    if world % (tp * pp):
        raise ValueError(
            f"{world} ranks cannot be laid out as parallel.tp={tp} x parallel.pp={pp}: "
            f"start a multiple of {tp * pp} ranks or lower tp or pp"
        )
    dp = world // (tp * pp)
    return rank // (tp * dp), rank // tp % dp, rank % tp


def sketch(rank: int, world: int, tp: int, pp: int, kv_heads: int, tied: bool) -> Mesh:
    """The mesh of one rank without process groups: enough to know which rectangles the rank holds."""
    p, d, t = layout(rank, world, tp, pp)
    copies = max(1, tp // kv_heads)
    ends = tied and pp > 1 and p in (0, pp - 1)
    return Mesh(
        pp=Axis(None, p, pp),
        dp=Axis(None, d, world // (tp * pp)),
        tp=Axis(None, t, tp),
        kv=Axis(None, t % copies, copies),
        tied=Axis(None, int(p > 0), 2) if ends else ONE,
        world=Axis(None, rank, world),
        forward=Axis(None, p, pp),
        backward=Axis(None, p, pp),
    )


def build_mesh(
    tp: int, pp: int, kv_heads: int, tied: bool, device: torch.device, timeout: timedelta | None = None
) -> Mesh:
    """The mesh over the default process group (or one bare process). Collective: every rank makes the same call.

    Args:
        kv_heads: num_key_value_heads; K/V heads are replicated over consecutive tp ranks where tp is larger.
        tied: the embedding is shared by the first and the last stage.
        timeout: after which a collective fails; None = the backend's default.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    plans = [sketch(r, world, tp, pp, kv_heads, tied) for r in range(world)]
    mine = plans[rank]

    def connect(field: str, key) -> Axis:
        """One group for every set of ranks with equal `key`; all ranks create all groups in the same order."""
        axis = getattr(mine, field)
        members: dict[tuple, list[int]] = {}
        for r, plan in enumerate(plans):
            if getattr(plan, field).size > 1:
                members.setdefault(key(plan), []).append(r)
        for ranks in members.values():
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                axis = axis._replace(group=group)
        return axis

    def lane(m: Mesh) -> tuple:
        return m.dp.rank, m.tp.rank

    copies = mine.kv.size
    return Mesh(
        pp=connect("pp", lane),
        dp=connect("dp", lambda m: (m.pp.rank, m.tp.rank)),
        tp=connect("tp", lambda m: (m.pp.rank, m.dp.rank)),
        kv=connect("kv", lambda m: (m.pp.rank, m.dp.rank, m.tp.rank // copies)),
        tied=connect("tied", lane),
        world=mine.world._replace(group=dist.group.WORLD if world > 1 else None),
        forward=connect("forward", lane),
        backward=connect("backward", lane),
        device=device,
    )
