"""From the training layout to one for generation and back: weights are gathered once an iteration and freed after.

Decoding through a pipeline sends every token through all its ranks, and sharded weights would travel with each token
(the paper, section 3.2.3, saw a factor of 20). The generation layout has no pipeline: tp ranks within a node hold a
whole model, all other ranks are replicas. Which bytes go where follows from rectangles: what a rank wants meets what
the ranks of its own training replica hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.config import Config, ParallelConfig
from megallama.parallel.pieces import Index, Piece, Rect, pieces, views
from megallama.runtime.launch import TIMEOUT
from megallama.runtime.mesh import Mesh, build_mesh, sketch
from megallama.train.trainer import Trainer, build_stages

MESSAGE_BYTES = 1 << 28
"""Rectangles for one peer travel together up to this size: few messages, and little memory beside the weights."""

Place = tuple[str, Rect]
"""A held rectangle, by its tensor's name."""


class Transfer(NamedTuple):
    """Rectangle `rect` of tensor `name`, from the rectangle `held` of one rank to the rectangle `wanted` of another."""

    name: str
    rect: Rect
    held: Rect
    wanted: Rect


def generation_config(config: Config, tp: int) -> Config:
    """The same model on replicas of `tp` ranks without a pipeline; not compiled, as every pass has another shape."""
    return replace(config, parallel=ParallelConfig(tp=tp), train=replace(config.train, compile=False))


def generation_mesh(config: Config, tp: int, mesh: Mesh) -> Mesh:
    """The ranks of `mesh` as replicas of `tp` consecutive ones. Collective.

    Raises:
        ValueError: tp does not divide the world, or the model cannot be split so.
    """
    generation_config(config, tp).validate(mesh.world.size)
    if mesh.pp.size == 1 and mesh.tp.size == tp:
        return mesh
    return build_mesh(tp, 1, config.model.num_key_value_heads, False, mesh.device, TIMEOUT)


class Consolidation:
    """The weights of a trainer in a generation layout. Every rank makes one; its calls are collective.

    Args:
        trainer: of the training layout.
        mesh: from `generation_mesh`.
    """

    def __init__(self, trainer: Trainer, mesh: Mesh):
        self.trainer, self.mesh = trainer, mesh
        self.config = generation_config(trainer.config, mesh.tp.size)
        parallel = trainer.config.parallel
        self.same = parallel.pp == 1 and parallel.tp == mesh.tp.size
        self.incoming: dict[int, list[Transfer]] = {}
        self.outgoing: dict[int, list[Transfer]] = {}
        if not self.same:
            self._plan()

    def _plan(self) -> None:
        """What this rank gets from whom, and who gets what from it: within its training replica."""
        train, me = self.trainer.mesh, self.trainer.mesh.world.rank
        across = train.tp.size * train.dp.size
        replica = [
            p * across + train.dp.rank * train.tp.size + t for p in range(train.pp.size) for t in range(train.tp.size)
        ]
        holders: dict[Place, list[int]] = {}
        for rank in replica:
            for piece in self._pieces(self.trainer.config, rank):
                holders.setdefault((piece.name, piece.rect), []).append(rank)
        for rank in replica:
            for source, transfer in self._wants(rank, holders):
                if rank == me:
                    self.incoming.setdefault(source, []).append(transfer)
                if source == me:
                    self.outgoing.setdefault(rank, []).append(transfer)

    def _pieces(self, config: Config, rank: int) -> list[Piece]:
        """What a rank holds under a layout; nothing is allocated."""
        model, parallel = config.model, config.parallel
        world = self.mesh.world.size
        plan = sketch(rank, world, parallel.tp, parallel.pp, model.num_key_value_heads, model.tied)
        stages = build_stages(config, replace(plan, device=torch.device("meta")))
        return [piece for stage in stages.values() for held in pieces(stage).values() for piece in held]

    def _wants(self, rank: int, holders: dict[Place, list[int]]) -> Iterator[tuple[int, Transfer]]:
        """(source, transfer) of all that `rank` needs; of several holders itself, else one that others use less."""
        index: Index[tuple[Rect, int]] = Index()
        for (name, rect), ranks in holders.items():
            index.add(name, rect, (rect, rank if rank in ranks else ranks[rank % len(ranks)]))
        for piece in self._pieces(self.config, rank):
            if piece.rect.area:
                for overlap, held, (_, source) in index.cover(piece.name, piece.rect):
                    yield source, Transfer(piece.name, overlap, held, piece.rect)

    @contextmanager
    def gathered(self) -> Iterator[Trainer]:
        """The model in the generation layout, with the weights as they are now; they are freed at the end."""
        if self.trainer.optimizer is not None:
            self.trainer.optimizer.ready()
        if self.same:
            yield Trainer(self.config, self.mesh, self.trainer.stages, None)
            return
        stages = build_stages(self.config, self.mesh)
        ours = {
            (piece.name, piece.rect): view for stage in self.trainer.stages.values() for piece, view in views(stage)
        }
        theirs = {(piece.name, piece.rect): view for stage in stages.values() for piece, view in views(stage)}
        self._move(ours, theirs)
        generating = Trainer(self.config, self.mesh, stages, None)
        try:
            yield generating
        finally:
            generating.stages.clear()
            stages.clear()

    def _move(self, ours: dict[Place, Tensor], theirs: dict[Place, Tensor]) -> None:
        """Send and receive, a message for each peer at a time."""

        def part(place: dict[Place, Tensor], of: Rect, transfer: Transfer) -> Tensor:
            rect = transfer.rect
            view = place[transfer.name, of]
            return view[rect.r0 - of.r0 : rect.r1 - of.r0, rect.c0 - of.c0 : rect.c1 - of.c0]

        me = self.mesh.world.rank
        dtype, device = next(iter(theirs.values())).dtype, self.mesh.device
        for transfer in self.incoming.get(me, []):
            part(theirs, transfer.wanted, transfer).copy_(part(ours, transfer.held, transfer))
        sends = {peer: list(_messages(moves, dtype)) for peer, moves in self.outgoing.items() if peer != me}
        receives = {peer: list(_messages(moves, dtype)) for peer, moves in self.incoming.items() if peer != me}
        for turn in range(max(map(len, [*sends.values(), *receives.values()]), default=0)):
            operations, arriving = [], []
            for peer in sorted({*sends, *receives}):
                if turn < len(receives.get(peer, [])):
                    moves = receives[peer][turn]
                    buffer = torch.empty(sum(move.rect.area for move in moves), dtype=dtype, device=device)
                    operations.append(dist.P2POp(dist.irecv, buffer, peer))
                    arriving.append((moves, buffer))
                if turn < len(sends.get(peer, [])):
                    parts = [part(ours, move.held, move).reshape(-1) for move in sends[peer][turn]]
                    operations.append(dist.P2POp(dist.isend, torch.cat(parts), peer))
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            for moves, buffer in arriving:
                for move, flat in zip(moves, buffer.split([move.rect.area for move in moves]), strict=True):
                    part(theirs, move.wanted, move).copy_(flat.view(move.rect.height, move.rect.width))


def _messages(moves: list[Transfer], dtype: torch.dtype) -> Iterator[list[Transfer]]:
    """Transfers in runs of at most MESSAGE_BYTES; both ends cut them alike."""
    taken: list[Transfer] = []
    size = 0
    for move in moves:
        if taken and size + move.rect.area * dtype.itemsize > MESSAGE_BYTES:
            yield taken
            taken, size = [], 0
        taken.append(move)
        size += move.rect.area * dtype.itemsize
    if taken:
        yield taken
