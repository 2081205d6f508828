"""AdamW over ZeRO-1 shards (Rajbhandari et al. 2020; Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megallama.config import OptimConfig
from megallama.optim.bucket import Bucket, Held
from megallama.parallel.grads import PipelineStage, WeightGrads
from megallama.parallel.pieces import Rect, Slot, pieces
from megallama.runtime.mesh import Mesh

BUCKET_ELEMENTS = 1 << 25
"""A bucket is at least this big (or one unit): large enough for full bandwidth, small enough to overlap."""

NORM_ROW = 4096
"""Elements whose squares are summed in the gradient's own precision."""

STATES = ("weight", "exp_avg", "exp_avg_sq")


class Zero1:
    """The optimizer of one rank's stages.

    Args:
        stages: stage number -> stage.
        optim: AdamW's constants.
    """

    def __init__(self, stages: Mapping[int, PipelineStage], mesh: Mesh, optim: OptimConfig):
        self.mesh, self.optim = mesh, optim
        self.updates = 0
        self.buckets: dict[int, list[Bucket]] = {number: self._bucketise(stage) for number, stage in stages.items()}
        self.grads: dict[int, WeightGrads] = {number: stage.grads for number, stage in stages.items()}

    def _bucketise(self, stage: PipelineStage) -> list[Bucket]:
        """Whole units, from the last to the first, as gradients become ready; a tied embedding is its own bucket,
        identical on both stages, else the copies' updates would differ in the last bit."""
        named = dict(stage.named_parameters())
        held = {named[name]: Held(named[name], rectangles) for name, rectangles in pieces(stage).items()}
        owners = Counter(p for module in stage.modules() for p in module.parameters(recurse=False))
        groups: list[list[Held]] = []
        current: list[Held] = []
        for unit in reversed(stage.units()):
            for weight in reversed(list(unit.parameters())):
                one = held.pop(weight, None)
                if one is None:
                    continue  # tied on this very stage: the head has come already
                if owners[weight] > 1 or any(p.replicas == "tied" for p in one.pieces):
                    groups.append([one])
                else:
                    current.append(one)
            if sum(h.weight.numel() for h in current) >= BUCKET_ELEMENTS:
                groups.append(current)
                current = []
        buckets = [Bucket(group, self.mesh) for group in [*groups, current] if group]
        self._connect(stage, buckets, owners)
        return buckets

    def _connect(self, stage: PipelineStage, buckets: list[Bucket], owners: Counter) -> None:
        """Gradients flow into the buckets; a unit waits for its buckets' weights before it runs."""
        bucket_of: dict[Tensor, Bucket] = {}
        for bucket in buckets:
            for held, buffer in zip(bucket.held, bucket.buffers(), strict=True):
                bucket_of[held.weight] = bucket
                stage.grads.attach(held.weight, buffer, owners[held.weight])

        def arrived(weight: Tensor) -> None:
            bucket = bucket_of[weight]
            bucket.left -= 1
            if bucket.left == 0:
                bucket.reduce(())

        stage.grads.arrived = arrived
        for unit in stage.units():
            needed = list({id(b): b for b in (bucket_of[w] for w in unit.parameters())}.values())
            unit.register_forward_pre_hook(partial(_wait, needed))

    def _all(self) -> Iterator[Bucket]:
        for buckets in self.buckets.values():
            yield from buckets

    def begin(self, micros: int) -> None:
        """Start a step: `micros` contributions to every gradient."""
        for grads in self.grads.values():
            grads.begin(micros)
        for bucket in self._all():
            bucket.left = len(bucket.held)

    def reduce(self, stage: int) -> None:
        """The last contribution to `stage` is in: start whatever reduction has not started by itself."""
        for bucket in self.buckets[stage]:
            bucket.reduce(self.grads[stage].targets[held.weight] for held in bucket.held)

    def gradients(self) -> list[tuple[Bucket, Tensor]]:
        """After the last action: every bucket with this rank's shard of its gradient. Collective.

        Only now are replicas summed: a tied embedding's sum blocks until the other end of the pipeline has come to it,
        which during the pass may still need what this rank has to compute.
        """
        return [(bucket, bucket.gradient()) for bucket in self._all()]

    def square_norm(self, gradients: list[tuple[Bucket, Tensor]]) -> Tensor:
        """Sum of squares (fp64 scalar) of the elements that this rank owns; the global norm sums it over all ranks."""
        parts = [_square_sum(grad[lo:hi]) for bucket, grad in gradients for lo, hi in bucket.owned]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=self.mesh.device)

    def update(self, gradients: list[tuple[Bucket, Tensor]], lr: float, clip: float) -> None:
        """One AdamW step with gradients * `clip`; then start gathering the new weights."""
        o = self.optim
        for bucket, grad in gradients:
            for lo, hi in bucket.decayed:
                bucket.master[lo:hi].mul_(1 - lr * o.weight_decay)
            if clip != 1.0:
                grad.mul_(clip)
            adamw(
                [bucket.master],
                [grad],
                [bucket.exp_avg],
                [bucket.exp_avg_sq],
                [],
                [torch.tensor(float(self.updates), device=grad.device)],
                fused=True,
                amsgrad=False,
                beta1=o.betas[0],
                beta2=o.betas[1],
                lr=lr,
                weight_decay=0.0,
                eps=o.eps,
                maximize=False,
            )
            bucket.publish()
        self.updates += 1

    def slots(self) -> Iterator[tuple[Slot, dict[str, Tensor]]]:
        """Every canonical rectangle on this rank with its states: {weight (the master), exp_avg, exp_avg_sq}."""
        for bucket in self._all():
            states = dict(zip(STATES, (bucket.master, bucket.exp_avg, bucket.exp_avg_sq), strict=True))
            for slot in bucket.slots:
                yield slot, {name: slot.view(flat) for name, flat in states.items()}

    def weights(self) -> Iterator[tuple[Slot, dict[str, Tensor]]]:
        """The same without the moments: what a converted checkpoint has, with which a new run starts."""
        return ((slot, {"weight": states["weight"]}) for slot, states in self.slots())

    def load_weights(
        self, read: Callable[[str, Rect, Tensor], None], meet: Callable[[], object] = lambda: None
    ) -> None:
        """Fill the masters from a source of canonical rectangles and gather the weights. Collective over dp.

        Args:
            meet: called between the two, where ranks may read at unequal speeds: the gather waits ten minutes at most.
        """
        for slot, states in self.weights():
            read(slot.name, slot.rect, states["weight"])
        meet()
        self.publish()

    def publish(self) -> None:
        """Gather all weights from the masters and wait for them. Collective over dp."""
        for bucket in self._all():
            bucket.publish()
        self.ready()

    def ready(self) -> None:
        """Wait until all weights are complete: for those who read them without a forward pass."""
        for bucket in self._all():
            bucket.ready()


def _square_sum(x: Tensor) -> Tensor:
    """Sum of squares of a flat tensor in fp64, by way of short rows: on a CPU, one long fp32 sum of 20 million squares
    is wrong by 1e-3."""
    rows = x[: x.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    norms = torch.cat((torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(x[rows.numel() :])[None]))
    return norms.double().square().sum()


def _wait(buckets: list[Bucket], module: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook: the unit's weights must have been gathered."""
    for bucket in buckets:
        bucket.ready()
