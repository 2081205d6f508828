"""Greedy continuation: the same ids in every layout, and the ids that a full softmax would pick."""

from __future__ import annotations

import torch

from distributed import Ranks
from megallama.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megallama.data.batch import IGNORE, Batch
from megallama.inference.greedy import continue_greedily
from megallama.model.initial import RandomWeights
from megallama.parallel.pieces import views
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import Trainer, build_stages

MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=51,
    max_position_embeddings=20,
    initializer_range=0.5,
)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5]]


def frozen(tp: int, pp: int) -> Trainer:
    config = Config(model=MODEL, parallel=ParallelConfig(tp=tp, pp=pp), train=TrainConfig(dtype="float64"))
    mesh = build_mesh(tp, pp, MODEL.num_key_value_heads, False, torch.device("cpu"))
    stages = build_stages(config, mesh)
    for stage in stages.values():
        for piece, view in views(stage):
            RandomWeights(MODEL, seed=3).read(piece.name, piece.rect, view)
    return Trainer(config, mesh, stages, None)


def continuation(rank: int, world: int, tp: int, pp: int, stop: int | None) -> list[list[int]]:
    return continue_greedily(frozen(tp, pp), PROMPTS, 9, stop)


def test_each_token_is_the_most_likely_one() -> None:
    trainer = frozen(1, 1)
    for prompt, row in zip(PROMPTS, continue_greedily(trainer, PROMPTS, 9, None), strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(prompt) + 9
        tokens = torch.tensor(row)
        batch = Batch.pack([(tokens, torch.full_like(tokens, IGNORE))])
        (best,) = trainer.infer([batch], lambda logits, batch: logits[:, : MODEL.vocab_size].argmax(1))
        assert row[len(prompt) :] == best[len(prompt) - 1 : -1].tolist()


def test_every_layout_and_rank_gives_the_same_ids() -> None:
    alone = continuation(0, 1, 1, 1, None)
    with Ranks(4) as ranks:
        for tp, pp in ((2, 2), (4, 1)):
            assert ranks.run(continuation, tp, pp, None) == [alone] * 4


def test_a_row_ends_at_the_stop_id_and_at_the_longest_sequence() -> None:
    free = continue_greedily(frozen(1, 1), PROMPTS, 9, None)
    stop = free[0][5]
    stopped = continue_greedily(frozen(1, 1), PROMPTS, 9, stop)
    assert stopped[0] == free[0][: free[0].index(stop, len(PROMPTS[0])) + 1]
    assert all(len(row) <= MODEL.max_position_embeddings for row in continue_greedily(frozen(1, 1), PROMPTS, 99, None))
