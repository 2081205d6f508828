"""Consolidation: in every layout the generation weights are the training weights, bit by bit, and go away again."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from distributed import Ranks
from megallama.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import Batch
from megallama.inference import consolidate
from megallama.inference.consolidate import Consolidation, generation_mesh
from megallama.model.initial import RandomWeights
from megallama.parallel.pieces import views
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import NextToken, build_trainer

MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=37,
    initializer_range=0.14,
)
LAYOUTS = [  # world, (tp, pp, vpp) of training, tp of generation
    (2, (1, 2, 1), 1),
    (2, (1, 2, 1), 2),
    (2, (2, 1, 1), 1),
    (2, (2, 1, 1), 2),
    (4, (2, 2, 1), 1),
    (4, (2, 2, 1), 2),
    (4, (2, 2, 1), 4),
    (4, (1, 2, 2), 2),
    (4, (4, 1, 1), 2),
]


def run_config(tp: int, pp: int, vpp: int, tied: bool) -> Config:
    return Config(
        model=replace(MODEL, tie_word_embeddings=tied),
        parallel=ParallelConfig(tp=tp, pp=pp, vpp=vpp, schedule="interleaved" if vpp > 1 else "1f1b"),
        train=TrainConfig(steps=10, dtype="float32", micro_batch_size=1, global_batch_size=4, seed=7),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
    )


def differences(rank: int, world: int, config: Config, tp: int, message_bytes: int) -> tuple[float, bool, bool]:
    """Largest difference to the canonical weights, whether a step moves them, whether the memory is free again."""
    consolidate.MESSAGE_BYTES = message_bytes
    model, parallel = config.model, config.parallel
    mesh = build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    trainer = build_trainer(config, mesh)
    plan = Consolidation(trainer, generation_mesh(config, tp, mesh))
    source, worst = RandomWeights(model, 7), 0.0
    with plan.gathered() as generating:
        assert generating.mesh.tp.size == tp and generating.mesh.dp.size == world // tp
        for stage in generating.stages.values():
            for piece, view in views(stage):
                whole = torch.empty_like(view)
                source.read(piece.name, piece.rect, whole)
                worst = max(worst, float((whole - view).abs().max()))
        before = [view.clone() for stage in generating.stages.values() for _, view in views(stage)]
        kept = weakref.ref(next(iter(generating.stages.values())).blocks[0].o.weight)
    del stage, view, piece  # of the loops
    gc.collect()
    freed = plan.same or kept() is None
    tokens = torch.arange(12) % 37
    batches = [Batch.pack([(tokens, tokens.roll(-1))], parallel.tp)] * (4 // mesh.dp.size)
    trainer.step(batches, NextToken(model.vocab_size, mesh.tp))
    with plan.gathered() as generating:
        after = [view.clone() for stage in generating.stages.values() for _, view in views(stage)]
    moved = not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.shape[0] > 1)
    return worst, moved, freed


@pytest.mark.parametrize("tied, message_bytes", ((False, 1 << 28), (True, 1000)))
def test_every_layout_meets_its_own_weights(tied: bool, message_bytes: int) -> None:
    for world in (2, 4):
        with Ranks(world) as ranks:
            for size, (tp, pp, vpp), generation in LAYOUTS:
                if size == world:
                    config = run_config(tp, pp, vpp, tied)
                    found = ranks.run(differences, config, generation, message_bytes)
                    assert found == [(0.0, True, True)] * world, (tp, pp, vpp, generation, found)


def test_one_process_uses_the_very_weights() -> None:
    assert differences(0, 1, run_config(1, 1, 1, False), 1, 1 << 28) == (0.0, True, True)
