"""The interpreter: runs one rank's row of a lowered program on real stages, for training or forward only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megallama.data.batch import Batch
from megallama.parallel.grads import PipelineStage
from megallama.pipeline.program import Action
from megallama.runtime.mesh import Mesh

Loss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(sum over the micro-batch's valid tokens, sums of other metrics) from the last stage's output."""


Read = Callable[[Tensor, Batch], Tensor]
"""What to keep of the last stage's output."""


class Boundary(NamedTuple):
    """What crosses from stage to stage: (tokens / tp, width) of `dtype`; `stages` is their total number."""

    stages: int
    width: int
    dtype: torch.dtype


class Run(NamedTuple):
    """What a training pass saw of the loss, one entry a micro-batch; empty except on the last stage's rank."""

    losses: list[Tensor]
    metrics: list[dict[str, Tensor]]


class Engine:
    """One rank's stages and how they talk to their neighbours.

    Args:
        stages: stage number -> stage.
        boundary: shape of what crosses between stages.
        reduce: called with a stage number once the stage's gradients are complete.
    """

    def __init__(
        self, stages: Mapping[int, PipelineStage], boundary: Boundary, mesh: Mesh, reduce: Callable[[int], None]
    ):
        self.stages, self.boundary, self.mesh, self.reduce = stages, boundary, mesh, reduce

    def train(self, row: Sequence[Action], micros: Sequence[Batch], loss: Loss, scale: float) -> Run:
        """Forward and backward of all micro-batches; gradients are of `scale` times the sum of the losses."""
        run = _Train(self, micros, loss, scale, any(a.kind == "W" for a in row))
        run.follow(row)
        return Run(run.losses, run.metrics)

    def infer(self, row: Sequence[Action], micros: Sequence[Batch], read: Read) -> list[Tensor]:
        """`read(output, batch)` of every micro-batch without gradients, on the last stage's rank; elsewhere []."""
        run = _Infer(self, micros, read)
        with torch.no_grad():
            run.follow(row)
        return run.results


class _Pass:
    """State of one pass over a row: tensors that wait for their next use, and transfers under way."""

    def __init__(self, engine: Engine, micros: Sequence[Batch]):
        self.engine, self.micros = engine, micros
        self.outgoing: dict[tuple[str, int, int], Tensor] = {}
        self.incoming: dict[tuple[str, int, int], tuple[Tensor, dist.Work | None]] = {}
        self.sent: deque[tuple[dist.Work | None, Tensor]] = deque()

    def follow(self, row: Sequence[Action]) -> None:
        for action in row:
            getattr(self, "do_" + action.kind)(action)
        while self.sent:
            self._finish_send()

    def _link(self, action: Action, sends: bool) -> tuple[dist.ProcessGroup, int, int]:
        """Communicator, peer rank and tag of a transfer. Both ends name it by its receiving stage."""
        mesh, down = self.engine.mesh, action.kind[1] == "F"
        axis = mesh.forward if down else mesh.backward
        step = 1 if down == sends else -1
        receiver = action.stage + (0 if not sends else 1 if down else -1)
        assert axis.group is not None, "a transfer needs a pipeline of several ranks"
        return axis.group, (axis.rank + step) % axis.size, receiver * len(self.micros) + action.micro

    def _send(self, action: Action) -> None:
        tensor = self.outgoing.pop((action.kind[1], action.stage, action.micro))
        group, peer, tag = self._link(action, sends=True)
        self.sent.append((dist.isend(tensor, group=group, group_dst=peer, tag=tag), tensor))
        while len(self.sent) > self.engine.mesh.pp.size:
            self._finish_send()

    def _receive(self, action: Action) -> None:
        tokens = self.micros[action.micro].length // self.engine.mesh.tp.size
        boundary = self.engine.boundary
        buffer = torch.empty(tokens, boundary.width, dtype=boundary.dtype, device=self.engine.mesh.device)
        group, peer, tag = self._link(action, sends=False)
        work = dist.irecv(buffer, group=group, group_src=peer, tag=tag)
        self.incoming[action.kind[1], action.stage, action.micro] = buffer, work

    def _finish_send(self) -> None:
        """Wait for the oldest send and free its tensor. The program is free of deadlock even if every send blocks, so
        waiting is safe anywhere; a pipeline's worth of sends may be under way, as many as a warm-up has."""
        work, _ = self.sent.popleft()
        if work is not None:
            work.wait()

    do_SF = do_SB = _send
    do_RF = do_RB = _receive

    def _take(self, kind: str, stage: int, micro: int) -> Tensor:
        tensor, work = self.incoming.pop((kind, stage, micro))
        if work is not None:
            work.wait()
        return tensor

    def _give(self, kind: str, stage: int, micro: int, tensor: Tensor) -> None:
        """Keep a result for its send, or hand it to the neighbour stage on this very rank."""
        neighbour = stage + (1 if kind == "F" else -1)
        if neighbour in self.engine.stages:
            self.incoming[kind, neighbour, micro] = tensor, None
        else:
            self.outgoing[kind, stage, micro] = tensor

    def _last(self, stage: int) -> bool:
        return stage == self.engine.boundary.stages - 1

    def do_G(self, action: Action) -> None:
        self.engine.reduce(action.stage)


class _Infer(_Pass):
    def __init__(self, engine: Engine, micros: Sequence[Batch], read: Read):
        super().__init__(engine, micros)
        self.read = read
        self.results: list[Tensor] = []

    def do_F(self, action: Action) -> None:
        _, stage, micro = action
        x = self._take("F", stage, micro) if stage else None
        y = self.engine.stages[stage](x, self.micros[micro])
        if self._last(stage):
            self.results.append(self.read(y, self.micros[micro]))
        else:
            self._give("F", stage, micro, y)


class _Train(_Pass):
    def __init__(self, engine: Engine, micros: Sequence[Batch], loss: Loss, scale: float, split: bool):
        super().__init__(engine, micros)
        self.loss, self.scale, self.split = loss, scale, split
        self.losses: list[Tensor] = []
        self.metrics: list[dict[str, Tensor]] = []
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.roots: dict[tuple[int, int], GradientEdge] = {}
        self.products: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def do_F(self, action: Action) -> None:
        _, stage, micro = action
        x = None
        if stage:
            x = self.inputs[stage, micro] = self._take("F", stage, micro).requires_grad_()
        y = self.engine.stages[stage](x, self.micros[micro])
        if self._last(stage):
            y, metrics = self.loss(y, self.micros[micro])
            self.losses.append(y.detach())
            self.metrics.append(metrics)
        else:
            self._give("F", stage, micro, y.detach())
        self.roots[stage, micro] = get_gradient_edge(y)  # y itself is free once it is sent

    def do_B(self, action: Action) -> None:
        _, stage, micro = action
        if self._last(stage):
            dy = torch.full_like(self.losses[micro], self.scale)
        else:
            dy = self._take("B", stage, micro)
        grads = self.engine.stages[stage].grads
        grads.deferred = self.split
        torch.autograd.backward((self.roots.pop((stage, micro)),), (dy,))
        self.products[stage, micro] = grads.take_queue()
        if stage:
            dx = self.inputs.pop((stage, micro)).grad
            assert dx is not None, f"stage {stage} must depend on its input"
            self._give("B", stage, micro, dx)

    def do_W(self, action: Action) -> None:
        with torch.no_grad():
            for product in self.products.pop((action.stage, action.micro)):
                product()
