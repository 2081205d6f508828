"""A short training run on any layout, returned in canonical tensors: what "same loss in every layout" compares.

Settings cannot hide a bug: lr 1e-3 with warm-up 1, learnable data, rows of unequal length, labels masked at random with
one row fully masked, vocabulary and lengths that tp does not divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import IGNORE, Batch
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.trainer import NextToken, Trainer, build_trainer

SAMPLES, LENGTH = 16, 24

MODEL = ModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=101,
    initializer_range=0.1,
)


class Part(NamedTuple):
    """A rectangle of a canonical tensor with its values, from one rank."""

    name: str
    rect: Rect
    values: Tensor
    owner: bool


@dataclass
class Trajectory:
    """What one rank reports."""

    losses: list[float]
    norms: list[float]
    gradients: list[Part]
    weights: list[Part]


def run_config(steps: int = 3, dtype: str = "float64", micro: int = 2, model: ModelConfig = MODEL, **parallel) -> Config:
    """A configuration of the trajectory with its parallel section's keys given by name."""
    return Config(
        model=model,
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(steps=steps, micro_batch_size=micro, global_batch_size=SAMPLES, dtype=dtype, seed=7),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, eps=1e-5),
    )


def sample_rows(step: int, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """The global batch of a step: rows (tokens, labels) of a Markov chain, the same on every rank."""
    random = torch.Generator().manual_seed(1000 + step)
    rows = []
    for n in range(SAMPLES):
        length = LENGTH - n % 5
        tokens = torch.zeros(length + 1, dtype=torch.int64)
        noise = torch.rand(length + 1, generator=random)
        for t in range(length):
            tokens[t + 1] = (3 * tokens[t] + 7) % vocab if noise[t] < 0.8 else int(noise[t] * 1000) % vocab
        labels = tokens[1:].clone()
        labels[torch.rand(length, generator=random) < n / (SAMPLES - 1)] = IGNORE  # the last row has no label at all
        rows.append((tokens[:-1], labels))
    return rows


def micro_batches(config: Config, mesh: Mesh, step: int) -> list[Batch]:
    """This replica's micro-batches of a step."""
    rows = sample_rows(step, config.model.vocab_size)[mesh.dp.rank :: mesh.dp.size]
    size = config.train.micro_batch_size
    return [Batch.pack(rows[at : at + size], mesh.tp.size) for at in range(0, len(rows), size)]


def train(rank: int, world: int, config: Config, plant: Callable[[Trainer], None] | None = None) -> Trajectory:
    """Run on the default process group. `plant` may break the trainer first, to show that the comparison notices."""
    mesh = build_mesh(
        config.parallel.tp,
        config.parallel.pp,
        config.model.num_key_value_heads,
        config.model.tie_word_embeddings,
        torch.device("cpu"),
    )
    trainer = build_trainer(config, mesh)
    if plant:
        plant(trainer)
    assert trainer.optimizer is not None
    gradients: list[Part] = []
    update = trainer.optimizer.update

    def capture(reduced, lr, clip):
        if not gradients:
            for bucket, grad in reduced:
                gradients.extend(Part(s.name, s.rect, s.view(grad).clone(), s.owner) for s in bucket.slots)
        update(reduced, lr, clip)

    trainer.optimizer.update = capture
    loss = NextToken(config.model.vocab_size, mesh.tp)
    stats = [trainer.step(micro_batches(config, mesh, step), loss) for step in range(config.train.steps)]
    weights = [Part(s.name, s.rect, v["weight"].clone(), s.owner) for s, v in trainer.optimizer.slots()]
    return Trajectory([s.loss for s in stats], [s.grad_norm for s in stats], gradients, weights)


def assemble(parts: list[Part], model: ModelConfig) -> dict[str, Tensor]:
    """Canonical tensors from the owners' rectangles; replicas must hold the same bits."""
    shapes = {name: matrix(shape) for name, shape in canonical_shapes(model).items()}
    tensors = {name: torch.full(shape, float("nan"), dtype=torch.float64) for name, shape in shapes.items()}
    for part in sorted(parts, key=lambda p: not p.owner):
        r = part.rect
        place = tensors[part.name][r.r0 : r.r1, r.c0 : r.c1]
        if part.owner:
            assert place.isnan().all(), f"{part.name} {tuple(r)} is owned twice"
            place.copy_(part.values)
        else:
            assert torch.equal(place, part.values.double()), f"replicas of {part.name} {tuple(r)} differ"
    for name, tensor in tensors.items():
        assert not tensor.isnan().any(), f"{name} is not owned everywhere"
    return tensors


class Errors(NamedTuple):
    """How far a layout is from the oracle: relative loss, norm and step-1 gradient (worst tensor), absolute weights."""

    loss: float
    norm: float
    gradient: float
    weight: float


def errors(ranks: list[Trajectory], oracle: list[Trajectory], model: ModelConfig) -> Errors:
    """Largest errors over steps and tensors; every rank must report the same losses and norms."""
    assert all(r.losses == ranks[0].losses and r.norms == ranks[0].norms for r in ranks), "ranks disagree"

    def relative(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    def tensors(field: str, of: list[Trajectory]) -> dict[str, Tensor]:
        return assemble([part for r in of for part in getattr(r, field)], model)

    grads, true_grads = tensors("gradients", ranks), tensors("gradients", oracle)
    weights, true_weights = tensors("weights", ranks), tensors("weights", oracle)
    return Errors(
        relative(ranks[0].losses, oracle[0].losses),
        relative(ranks[0].norms, oracle[0].norms),
        max(float((grads[n] - g).norm() / g.norm()) for n, g in true_grads.items()),
        max(float((weights[n] - w).abs().max()) for n, w in true_weights.items()),
    )


def tied(model: ModelConfig = MODEL) -> ModelConfig:
    return replace(model, tie_word_embeddings=True)
