"""Small Python objects that ranks tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megallama.runtime.mesh import Axis

T = TypeVar("T")


def everyones(own: T, axis: Axis) -> list[T]:
    """What each rank of the axis has, in their order. Collective."""
    found: list[T] = [own] * axis.size
    if axis.size > 1:
        dist.all_gather_object(found, own, group=axis.group)
    return found


def from_first(make: Callable[[], T], axis: Axis, device: torch.device) -> T:
    """What `make` returns on the axis' first rank, where alone it is called, on every rank. Collective."""
    box = [make() if axis.rank == 0 else None]
    if axis.size > 1:
        dist.broadcast_object_list(box, group=axis.group, group_src=0, device=device)
    return box[0]  # type: ignore[return-value]
