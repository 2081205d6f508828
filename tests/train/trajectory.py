"""A tiny run in any layout, held against one process: what "same loss in every layout" compares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from megallama.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import matrix
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train import trajectory
from megallama.train.probe import Part
from megallama.train.shrink import EPS, LEARNING_RATE
from megallama.train.trajectory import TOLERANCES, Comparison, Trajectory, compare
from megallama.train.verify import run_layout, run_one_process

SAMPLES = 8
MODEL = ModelConfig(  # vocabulary and lengths that tp does not divide; K/V heads are copied from tp = 4 on
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=37,
    initializer_range=0.14,
)


def run_config(
    steps: int = 3, dtype: str = "float64", micro: int = 2, model: ModelConfig = MODEL, **parallel
) -> Config:
    """A configuration of the trajectory with its parallel section's keys given by name."""
    return Config(
        model=model,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=13),
        train=TrainConfig(steps=steps, micro_batch_size=micro, global_batch_size=SAMPLES, dtype=dtype, seed=7),
        optim=OptimConfig(lr=LEARNING_RATE, warmup_steps=1, eps=EPS),
    )


@lru_cache(maxsize=32)
def mesh_of(tp: int, pp: int, kv_heads: int, tied: bool) -> Mesh:
    """Groups are made once for the life of a rank."""
    return build_mesh(tp, pp, kv_heads, tied, torch.device("cpu"))


def on_rank(rank: int, world: int, config: Config, probe: bool = False) -> Trajectory:
    """The run on the default process group."""
    parallel, model = config.parallel, config.model
    mesh = mesh_of(parallel.tp, parallel.pp, model.num_key_value_heads, model.tie_word_embeddings)
    return run_layout(config, mesh, probe)


@lru_cache(maxsize=32)
def oracle(config: Config) -> Trajectory:
    """The run on one process; a configuration of any layout will do."""
    return run_one_process(config, Mesh(), probe=False)


def against_one_process(ranks: Sequence[Trajectory], config: Config) -> Comparison:
    """Compare, with micro-batches of another size where the layout needs that."""
    plain = replace(config.parallel, tp=1, pp=1, vpp=1, layers_per_stage=(), schedule="1f1b", recompute="none")
    alone = replace(config, parallel=plain, train=replace(config.train, micro_batch_size=2))
    return compare(ranks, oracle(alone), config.model, TOLERANCES[config.train.dtype])


def assemble(parts: Iterable[Part], model: ModelConfig) -> dict[str, Tensor]:
    """Canonical tensors from the owners' rectangles; replicas must hold the same bits."""
    shapes = {name: matrix(shape) for name, shape in canonical_shapes(model).items()}
    tensors, faults = trajectory.assemble(parts, shapes)
    assert not faults, faults
    return tensors
