"""One optimizer step, or one forward pass, of a model on the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.config import Config
from megallama.data.batch import IGNORE, Batch
from megallama.model.initial import RandomWeights
from megallama.model.llama import Stage, stage_spans
from megallama.model.segments import PLAIN, compiled
from megallama.optim import Zero1, learning_rate
from megallama.parallel.collectives import all_reduce
from megallama.parallel.loss import cross_entropy_sum
from megallama.pipeline.engine import Boundary, Engine, Loss, Run
from megallama.pipeline.program import Program, lower
from megallama.pipeline.schedules import build, forward_only
from megallama.plan.cost import stage_layers
from megallama.runtime.mesh import Axis, Mesh

T = TypeVar("T")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Stats(NamedTuple):
    """One step, the same on every rank.

    Attributes:
        loss: mean over the valid tokens of the global batch (nan where it had none).
        grad_norm: global norm before clipping.
        lr: learning rate of the step.
        valid: valid tokens of the global batch.
        skipped: the gradient was not finite, so no rank changed its weights.
        stop: some rank asked to stop after this step.
        metrics: means of the loss function's other metrics, by valid token.
    """

    loss: float
    grad_norm: float
    lr: float
    valid: int
    skipped: bool
    stop: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class NextToken:
    """Sum of -log p(label) over the vocabulary shards of `tp`: the pretraining loss."""

    vocab: int
    tp: Axis

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy_sum(logits, batch.labels, self.vocab, self.tp, IGNORE), {}


def build_stages(config: Config, mesh: Mesh) -> dict[int, Stage]:
    """This rank's stages, weights still zero: chunk c of pipeline rank r is stage c * pp + r."""
    parallel = config.parallel
    spans = stage_spans(stage_layers(config.model, parallel, config.data.seq_length))
    dtype, segments = DTYPES[config.train.dtype], compiled() if config.train.compile else PLAIN
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are made in their own precision, not in fp32 first
    try:
        with mesh.device:
            return {
                number: Stage(config.model, spans[number], mesh.tp, parallel.recompute, segments)
                for number in range(mesh.pp.rank, len(spans), parallel.pp)
            }
    finally:
        torch.set_default_dtype(usual)


class Trainer:
    """A model on the mesh.

    Args:
        stages: this rank's stages.
        optimizer: None for a frozen model.

    Attributes:
        done: optimizer steps done, skipped ones included; the next step is number done + 1.
    """

    def __init__(self, config: Config, mesh: Mesh, stages: dict[int, Stage], optimizer: Zero1 | None):
        self.config, self.mesh, self.stages, self.optimizer = config, mesh, stages, optimizer
        self.done = 0
        parallel = config.parallel
        boundary = Boundary(parallel.pp * parallel.vpp, config.model.hidden_size, DTYPES[config.train.dtype])
        self.engine = Engine(stages, boundary, mesh, optimizer.reduce if optimizer else lambda stage: None)
        self._programs: dict[tuple[str, int], Program] = {}
        self._names: dict[Loss, list[str]] = {}

    def step(self, micros: Sequence[Batch], loss: Loss, stop: bool = False) -> Stats:
        """Forward, backward and update over this replica's micro-batches of one global batch. Collective.

        Args:
            stop: this rank has been asked to stop; all ranks learn of it in Stats.stop.

        The loss and its gradient are sums over all micro-batches and replicas, divided once by the global count of
        valid tokens, so they do not depend on how the batch was cut.
        """
        assert self.optimizer is not None, "a frozen model cannot be trained"
        mesh, optimizer = self.mesh, self.optimizer
        # Over the world, not dp: the gathers of new weights queue on dp's communicator and are to overlap with forward.
        copies = mesh.tp.size * mesh.pp.size
        count = int(all_reduce(self._vector([sum(b.count for b in micros)]), mesh.world).item()) // copies
        optimizer.begin(len(micros))
        row = self._program("train", len(micros))[mesh.pp.rank]
        run = self.engine.train(row, [b.to(mesh.device) for b in micros], loss, 1 / max(1, count))
        gradients = optimizer.gradients()
        names = self._metric_names(loss, run.metrics)
        square, asked, *sums = self._sum_over_world(optimizer.square_norm(gradients), stop, self._own_sums(run, names))
        norm = math.sqrt(square) if square >= 0 else math.nan
        self.done += 1
        lr = learning_rate(self.config.optim, self.done, self.config.train.steps)
        skipped = not math.isfinite(norm)
        if not skipped:
            limit = self.config.optim.clip_grad
            optimizer.update(gradients, lr, min(1.0, limit / (norm + 1e-6)) if limit else 1.0)
        mean = [x / count if count else math.nan for x in sums]
        return Stats(mean[0], norm, lr, count, skipped, asked > 0, dict(zip(names, mean[1:], strict=True)))

    def _own_sums(self, run: Run, names: list[str]) -> Tensor:
        """(1 + len(names),) sums of loss and metrics that this rank alone contributes; copies on tp count once."""
        if not run.losses or self.mesh.tp.rank:
            return torch.zeros(1 + len(names), dtype=torch.float64, device=self.mesh.device)
        columns = [run.losses, *([m[name] for m in run.metrics] for name in names)]
        return torch.stack([torch.stack(column).double().sum() for column in columns])

    def _sum_over_world(self, square_norm: Tensor, stop: bool, sums: Tensor) -> list[float]:
        """One reduction a step carries all that the ranks must agree on."""
        own = torch.cat((square_norm[None], self._vector([float(stop)]), sums))
        return all_reduce(own, self.mesh.world).tolist()

    def infer(self, micros: Sequence[Batch], read: Callable[[Tensor, Batch], Tensor]) -> list[Tensor]:
        """`read(output of the last stage, batch)` of every micro-batch, on every pipeline rank; no gradients."""
        row = self._program("infer", len(micros))[self.mesh.pp.rank]
        results = self.engine.infer(row, [b.to(self.mesh.device) for b in micros], read)
        pp = self.mesh.pp
        if pp.size == 1:
            return results
        shapes = self._from_last_stage([(r.shape, r.dtype) for r in results])
        if pp.rank < pp.size - 1:
            results = [torch.empty(shape, dtype=dtype, device=self.mesh.device) for shape, dtype in shapes]
        for result in results:
            dist.broadcast(result, group=pp.group, group_src=pp.size - 1)
        return results

    def _from_last_stage(self, told: list[T]) -> list[T]:
        """A small list as the last pipeline rank has it."""
        pp, box = self.mesh.pp, [told]
        if pp.size > 1:
            dist.broadcast_object_list(box, group=pp.group, group_src=pp.size - 1, device=self.mesh.device)
        return box[0]

    def evaluate(self, batches: Iterable[Sequence[Batch]], loss: Loss) -> float:
        """Mean loss over the valid tokens of all replicas' micro-batches, a forward pass for each list. Collective."""
        total = self._vector([0, 0])
        for micros in batches:
            sums = self.infer(micros, lambda output, batch: loss(output, batch)[0].double())
            total += self._vector([sum(float(s) for s in sums), sum(b.count for b in micros)])
        loss_sum, count = all_reduce(total, self.mesh.dp).tolist()
        return loss_sum / count if count else math.nan

    def _vector(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.mesh.device)

    def _program(self, kind: str, micros: int) -> Program:
        parallel = self.config.parallel
        if (kind, micros) not in self._programs:
            if kind == "train":
                program = build(parallel.schedule, parallel.pp, micros, parallel.vpp)
            else:
                program = forward_only(parallel.pp, micros, parallel.vpp)
            self._programs[kind, micros] = lower(program)
        return self._programs[kind, micros]

    def _metric_names(self, loss: Loss, metrics: list[dict[str, Tensor]]) -> list[str]:
        """Names of the loss function's metrics; only the last stage sees them, so they are told once."""
        if loss not in self._names:
            self._names[loss] = self._from_last_stage(sorted(metrics[0]) if metrics else [])
        return self._names[loss]


def empty_trainer(config: Config, mesh: Mesh) -> Trainer:
    """A trainer whose weights are still to be loaded."""
    stages = build_stages(config, mesh)
    return Trainer(config, mesh, stages, Zero1(stages, mesh, config.optim))


def build_trainer(config: Config, mesh: Mesh) -> Trainer:
    """A trainer with freshly initialised weights. Collective."""
    trainer = empty_trainer(config, mesh)
    assert trainer.optimizer is not None, "it is to be trained"
    trainer.optimizer.load_weights(RandomWeights(config.model, config.train.seed).read)
    return trainer
