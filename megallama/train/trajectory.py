"""A short training run told in canonical tensors, and how far a run on many ranks is from one on a single process.

Every rank records rectangles of canonical tensors, whatever its layout: outputs of modules, gradients of the first
step, weights after the last. Put together they are whole tensors, and two layouts can be compared element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.config import Config, ModelConfig
from megallama.data.batch import Batch
from megallama.model.canonical import canonical_shapes
from megallama.model.initial import RandomWeights
from megallama.optim import Zero1
from megallama.optim.bucket import Bucket
from megallama.parallel.pieces import Rect, matrix, pieces
from megallama.runtime.mesh import Mesh
from megallama.train.probe import Part, forward_outputs
from megallama.train.trainer import NextToken, Trainer, build_stages


class Tolerance(NamedTuple):
    """Largest differences that floating-point order explains.

    Attributes:
        gradient: norm of the difference over the norm, of every tensor of the first step; of module outputs too.
        norm: relative, of the global gradient norm of every step.
        loss: relative, of every step.
        weight: absolute, of every element after the last step.
    """

    gradient: float
    norm: float
    loss: float
    weight: float


TOLERANCES = {
    "float64": Tolerance(1e-10, 1e-10, 1e-10, 1e-10),
    "float32": Tolerance(1e-5, 1e-5, 2e-6, 5e-6),
}


@dataclass
class Trajectory:
    """What one rank saw of a run.

    Attributes:
        losses: mean loss of each step, and at the end that of the last batch under the final weights.
        norms: gradient norm of each step, before clipping.
        skipped: whether each step was skipped because its gradient was not finite.
        outputs: of modules, before the first step, by number of the micro-batch in the global batch.
        gradients: of the first step, before clipping, after all reductions.
        weights: after the last step.
    """

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    outputs: dict[int, list[Part]]
    gradients: list[Part]
    weights: list[Part]


class _RecordingZero1(Zero1):
    """Keeps the first step's gradients."""

    recorded: list[Part] | None = None

    def gradients(self) -> list[tuple[Bucket, Tensor]]:
        reduced = super().gradients()
        if self.recorded is None:
            self.recorded = [
                Part(slot.name, slot.rect, slot.view(grad).to("cpu", copy=True), slot.owner)
                for bucket, grad in reduced
                for slot in bucket.slots
            ]
        return reduced


def record(config: Config, mesh: Mesh, batches: Sequence[Sequence[Batch]], probe: bool = True) -> Trajectory:
    """Train from fresh weights on this replica's micro-batches of each step. Collective over the mesh.

    Args:
        batches: [step][micro-batch].
        probe: record module outputs too.
    """
    stages = build_stages(config, mesh)
    optimizer = _RecordingZero1(stages, mesh, config.optim)
    optimizer.load_weights(RandomWeights(config.model, config.train.seed).read)
    trainer = Trainer(config, mesh, stages, optimizer)
    outputs = forward_outputs(trainer, batches[0]) if probe else {}
    loss = NextToken(config.model.vocab_size, mesh.tp)
    stats = [trainer.step(micros, loss) for micros in batches]
    final = trainer.evaluate(batches[-1:], loss)  # also waits for the last gather of weights
    return Trajectory(
        [*(s.loss for s in stats), final],
        [s.grad_norm for s in stats],
        [s.skipped for s in stats],
        outputs,
        optimizer.recorded or [],
        _weights(trainer),
    )


def _weights(trainer: Trainer) -> list[Part]:
    """The weights that this rank computes with; every data-parallel replica has its own copy."""
    mesh, parts = trainer.mesh, []
    for stage in trainer.stages.values():
        parameters = dict(stage.named_parameters())
        for name, held in pieces(stage).items():
            values = parameters[name].detach()
            values = values.reshape(matrix(tuple(values.shape))).to("cpu", copy=True)
            for p in held:
                r, owner = p.local, mesh.replicas(p.replicas).rank == 0 and mesh.dp.rank == 0
                parts.append(Part(p.name, p.rect, values[r.r0 : r.r1, r.c0 : r.c1], owner))
    return parts


def assemble(parts: Iterable[Part], shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Tensor], list[str]]:
    """Whole tensors (fp64) from the owners' rectangles, and what is wrong with them.

    Every element must have one owner, and replicas must hold the same bits. Elements without an owner are nan.
    """
    tensors = {name: torch.full(shape, math.nan, dtype=torch.float64) for name, shape in shapes.items()}
    owned = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    faults = []
    for name, rect, values, owner in sorted(parts, key=lambda p: not p.owner):
        window = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
        if owner:
            tensors[name][window] = values.double()
            owned[name][window] += 1
        elif not torch.equal(_bits(tensors[name][window]), _bits(values.double())):
            faults.append(f"replicas of {name} {_place(rect)} differ")
    for name, count in owned.items():
        if bool((count != 1).any()):
            none, many = int((count == 0).sum()), int((count > 1).sum())
            faults.append(f"{name}: {none} elements have no owner, {many} have several")
    return tensors, faults


def _bits(x: Tensor) -> Tensor:
    """fp64 as integers, so that nan equals nan."""
    return x.contiguous().view(torch.int64)


def _place(rect: Rect) -> str:
    return f"[{rect.r0}:{rect.r1}, {rect.c0}:{rect.c1}]"


@dataclass(frozen=True)
class Comparison:
    """How far a run on many ranks is from one process; nan where a side has no number.

    Attributes:
        outputs: (module, micro-batch) -> relative error, in the order of the forward pass.
        gradients, weights: canonical name -> error (see Tolerance), in the order of the forward pass.
        faults: what needs no tolerance: replicas that differ, elements without owner, ranks that disagree.
    """

    tolerance: Tolerance
    loss: float
    norm: float
    gradients: dict[str, float]
    weights: dict[str, float]
    outputs: dict[tuple[str, int], float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def gradient(self) -> float:
        """Of the worst tensor."""
        return _worst(self.gradients.values())

    @property
    def weight(self) -> float:
        """Of the worst tensor."""
        return _worst(self.weights.values())

    @property
    def output(self) -> float:
        """Of the worst module and micro-batch."""
        return _worst(self.outputs.values())

    def first_divergent_output(self) -> tuple[str, int] | None:
        """The first module in the order of the forward pass whose output differs, and its micro-batch."""
        return next((key for key, error in self.outputs.items() if not error <= self.tolerance.gradient), None)

    def first_divergent_gradient(self) -> str | None:
        """The first tensor in the order of the backward pass whose gradient differs."""
        ordered = reversed(self.gradients.items())
        return next((name for name, error in ordered if not error <= self.tolerance.gradient), None)

    def failures(self) -> list[str]:
        """What exceeds its tolerance, in words; empty where the runs agree."""
        measured = {name: getattr(self, name) for name in Tolerance._fields}
        found = [
            f"{name} error {value:.1e} exceeds {limit:.0e}"
            for (name, value), limit in zip(measured.items(), self.tolerance, strict=True)
            if not value <= limit  # nan fails
        ]
        if output := self.first_divergent_output():
            found.append(f"the output of {output[0]} differs in micro-batch {output[1]}")
        return found + list(self.faults)


def compare(ranks: Sequence[Trajectory], oracle: Trajectory, model: ModelConfig, tolerance: Tolerance) -> Comparison:
    """Compare a run's records, one of each rank, with that of one process.

    Module outputs are compared where both recorded any; their micro-batches must hold the same samples.
    """
    shapes = {name: matrix(shape) for name, shape in canonical_shapes(model).items()}
    faults: list[str] = []

    def tensors(which: str) -> Iterable[tuple[str, Tensor, Tensor]]:
        ours, wrong = assemble((part for rank in ranks for part in getattr(rank, which)), shapes)
        faults.extend(f"{which}: {fault}" for fault in wrong)
        theirs, _ = assemble(getattr(oracle, which), shapes)
        return ((name, ours[name], theirs[name]) for name in shapes)

    if any(_numbers(rank) != _numbers(ranks[0]) for rank in ranks):
        faults.append("ranks report different losses or gradient norms")
    if any(rank.skipped != oracle.skipped for rank in ranks):
        faults.append("not the same steps were skipped")
    return Comparison(
        tolerance,
        loss=_worst(_ratio(abs(a - b), abs(b)) for a, b in zip(ranks[0].losses, oracle.losses, strict=True)),
        norm=_worst(_ratio(abs(a - b), abs(b)) for a, b in zip(ranks[0].norms, oracle.norms, strict=True)),
        gradients={name: relative_error(a, b) for name, a, b in tensors("gradients")},
        weights={name: float((a - b).abs().max()) for name, a, b in tensors("weights")},
        outputs=_compare_outputs(ranks, oracle) if ranks[0].outputs else {},
        faults=tuple(faults),
    )


def _numbers(rank: Trajectory) -> str:
    return repr((rank.losses, rank.norms, rank.skipped))  # as text, nan equals nan


def _compare_outputs(ranks: Sequence[Trajectory], oracle: Trajectory) -> dict[tuple[str, int], float]:
    errors: dict[str, dict[int, float]] = {}
    for micro, whole in oracle.outputs.items():
        shapes = {part.name: (part.rect.r1, part.rect.c1) for part in whole}
        found = [part for rank in ranks for part in rank.outputs.get(micro, ()) if part.owner]
        ours, _ = assemble([clip for part in found if (clip := _without_padding(part, shapes[part.name]))], shapes)
        theirs, _ = assemble(whole, shapes)
        for name in shapes:
            errors.setdefault(name, {})[micro] = relative_error(ours[name], theirs[name])
    return {(name, micro): error for name, by_micro in errors.items() for micro, error in by_micro.items()}


def _without_padding(part: Part, shape: tuple[int, int]) -> Part | None:
    """The part inside a tensor of `shape`: a micro-batch's rows are padded to a multiple of tp."""
    rect = part.rect.meet(Rect(0, shape[0], 0, shape[1]))
    return rect and part._replace(rect=rect, values=part.values[: rect.height, : rect.width])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm; 0 where both are zero."""
    return _ratio(float((ours - theirs).norm()), float(theirs.norm()))


def _ratio(difference: float, size: float) -> float:
    return 0.0 if difference == 0 else difference / size if size else math.inf


def _worst(errors: Iterable[float]) -> float:
    """The largest; nan if any is nan."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found, default=0.0)
