"""Idle models leave their device and come back as they were; here the host plays both parts."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from alignment_world import MODEL, RandomSource, World, config_of, make_world

from distributed import Ranks
from megallama.data.batch import Batch
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.models import frozen
from megallama.train.residence import Residence
from megallama.train.trainer import NextToken, Trainer, empty_trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("residence"))


def batch() -> list[Batch]:
    tokens = torch.arange(20) % 31
    return [Batch.pack([(tokens, tokens.roll(-1))])]


def trained(world: World) -> Trainer:
    trainer = empty_trainer(config_of(world, "residence", dtype="float32"), Mesh())
    trainer.optimizer.load_weights(RandomSource(MODEL).read)
    return trainer


def losses(world: World, moves: bool) -> list[float]:
    trainer, seen = trained(world), []
    residence = Residence(trainer, moves=moves)
    for _ in range(4):
        with residence.training():
            seen.append(trainer.step(batch(), NextToken(MODEL.vocab_size, Mesh().tp)).loss)
        held = [b for buckets in trainer.optimizer.buckets.values() for b in buckets]
        sizes = [getattr(b, name).untyped_storage().nbytes() for b in held for name in ("weights", "grads", "exp_avg")]
        assert all(size == 0 for size in sizes) == moves
    return seen


def test_a_trained_model_goes_on_as_if_it_had_stayed(world):
    stayed = losses(world, moves=False)
    assert losses(world, moves=True) == stayed and stayed[-1] < stayed[0]


def test_a_frozen_model_is_copied_to_the_host_once(world):
    trainer = frozen(config_of(world, "frozen", dtype="float32"), Mesh(), RandomSource(MODEL))
    expected = trainer.infer(batch(), lambda output, batch: output.clone())[0]
    residence = Residence(trainer, moves=True)
    kept = [storage.data_ptr() for storage in residence._host.values()]
    for _ in range(2):
        with residence.reading():
            assert torch.equal(trainer.infer(batch(), lambda output, batch: output.clone())[0], expected)
    assert [storage.data_ptr() for storage in residence._host.values()] == kept
    assert all(p.untyped_storage().nbytes() == 0 for stage in trainer.stages.values() for p in stage.parameters())


def late(publish, seconds: float) -> None:
    """The other replica's gather waits for this one."""
    time.sleep(seconds)
    publish()


def two_replicas(rank: int, size: int, config, moves: bool) -> list[float]:
    trainer = empty_trainer(config, build_mesh(1, 1, MODEL.num_key_value_heads, False, torch.device("cpu")))
    trainer.optimizer.load_weights(RandomSource(MODEL).read)
    for bucket in (bucket for held in trainer.optimizer.buckets.values() for bucket in held):
        bucket.publish = partial(late, bucket.publish, 0.1 * rank)
    residence, seen = Residence(trainer, moves=moves), []
    for _ in range(3):
        with residence.training():
            seen.append(trainer.step(batch(), NextToken(MODEL.vocab_size, trainer.mesh.tp)).loss)
    return seen


def test_a_model_leaves_only_once_its_weights_have_been_gathered(world):
    """The last update's gather is still under way when the model is told to leave."""
    config = config_of(world, "gather", dtype="float32")
    with Ranks(2) as ranks:
        assert ranks.run(two_replicas, config, True) == ranks.run(two_replicas, config, False)


def test_on_the_host_itself_nothing_moves(world):
    trainer = trained(world)
    Residence(trainer)
    assert all(p.untyped_storage().nbytes() for stage in trainer.stages.values() for p in stage.parameters())
