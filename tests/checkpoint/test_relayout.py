"""Any layout loads any layout: all pairs bit by bit without processes, and a dozen in real training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_runs import STATES, Canonical, Layout, canonical, config_of, go, open_run, same, save
from torch import Tensor

from distributed import Ranks
from megallama.checkpoint import Checkpointer
from megallama.checkpoint.store import Store, Stored, write_manifest, write_rectangles
from megallama.config import Config, ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.optim import Zero1
from megallama.optim.bucket import Bucket
from megallama.parallel.pieces import Slot, matrix
from megallama.runtime.mesh import sketch
from megallama.train.run import resume
from megallama.train.trainer import build_stages

WORLDS = (1, 2, 4, 8)
FACTORINGS = [
    Layout(tp, pp, world // (tp * pp), vpp)
    for world in WORLDS
    for tp in WORLDS
    for pp in WORLDS
    if world % (tp * pp) == 0
    for vpp in (1, 2)
    if vpp == 1 or pp in (2, 4)
]
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=37,
)


class Shard(NamedTuple):
    """One rank's part of the optimizer's state, planned without processes."""

    slots: list[tuple[Slot, dict[str, Tensor]]]
    buckets: list[Bucket]

    def flat(self) -> list[Tensor]:
        """All memory that a checkpoint restores."""
        return [x for b in self.buckets for x in (b.master, b.exp_avg, b.exp_avg_sq)]


def shards(layout: Layout, config: Config) -> list[Shard]:
    model, found = config.model, []
    for rank in range(layout.world):
        mesh = sketch(rank, layout.world, layout.tp, layout.pp, model.num_key_value_heads, model.tie_word_embeddings)
        optimizer = Zero1(build_stages(config, mesh), mesh, config.optim)
        found.append(Shard(list(optimizer.slots()), [b for bs in optimizer.buckets.values() for b in bs]))
    return found


def numbered(model: ModelConfig) -> Canonical:
    """Every element of every state is another number."""
    found, first = {}, 1
    for state in STATES:
        for name, shape in canonical_shapes(model).items():
            rows, cols = matrix(shape)
            found[state, name] = torch.arange(first, first + rows * cols, dtype=torch.float32).view(rows, cols)
            first += rows * cols
    assert first < 2**24, "fp32 tells all numbers apart"
    return found


def parts(shard: Shard) -> Iterator[Stored]:
    for slot, states in shard.slots:
        if slot.owner:
            for state, values in states.items():
                yield Stored(state, slot.name, slot.rect, values.dtype, partial(Tensor.clone, values))


TIED_PAIRS = [layout for layout in FACTORINGS if layout.pp > 1 or layout.world == 1]
"""Where a tied embedding has two owners, and where it has one."""


@pytest.mark.slow
@pytest.mark.parametrize(("layouts", "tied"), [(FACTORINGS, False), (TIED_PAIRS, True)], ids=["untied", "tied"])
def test_every_pair_of_layouts(tmp_path: Path, layouts: list[Layout], tied: bool) -> None:
    """The 20 factorings of 1, 2, 4, 8 and those with two chunks a rank, each loads what each has written: every weight,
    master and moment of every rank, copies of K/V heads (tp 4 and 8) and of tied embeddings included, bit for bit."""
    model = replace(MODEL, tie_word_embeddings=tied)
    truth, shapes = numbered(model), canonical_shapes(model)
    meta = {"step": 1, "consumed_samples": 8, "updates": 1, "model": {}, "fingerprints": {}}
    ranks = {layout: shards(layout, config_of(layout, tmp_path, model=model)) for layout in layouts}
    expected = {}
    for layout, held in ranks.items():
        for shard in held:
            for slot, states in shard.slots:
                r = slot.rect
                for state, values in states.items():
                    values.copy_(truth[state, slot.name][r.r0 : r.r1, r.c0 : r.c1])
        expected[layout] = [[x.clone() for x in shard.flat()] for shard in held]
        folder = tmp_path / str(layout)
        folder.mkdir()
        records = [write_rectangles(folder, f"rank_{n:05d}.safetensors", list(parts(s))) for n, s in enumerate(held)]
        write_manifest(folder, records, shapes, meta)
    for writer in layouts:
        store = Store(tmp_path / str(writer))
        for reader, held in ranks.items():
            for shard, before in zip(held, expected[reader], strict=True):
                for x in shard.flat():
                    x.zero_()
                for slot, states in shard.slots:
                    for state, values in states.items():
                        store.read(state, slot.name, slot.rect, values)
                assert all(map(torch.equal, shard.flat(), before)), f"{writer} -> {reader}"


PAIRS = [
    (Layout(), Layout(tp=2)),
    (Layout(), Layout(pp=2, vpp=2)),
    (Layout(tp=2), Layout(pp=2)),
    (Layout(tp=2), Layout(dp=2)),
    (Layout(tp=2), Layout(pp=2, vpp=2)),
    (Layout(pp=2), Layout(dp=2)),
    (Layout(pp=2), Layout(tp=2, pp=2)),
    (Layout(dp=2), Layout()),
    (Layout(dp=2), Layout(tp=2)),
    (Layout(dp=2), Layout(tp=4)),
    (Layout(pp=2, vpp=2), Layout(tp=2)),
    (Layout(pp=2, vpp=2), Layout(dp=2)),
]
"""tp 4 is more than the two K/V heads."""

SHALLOW = replace(MODEL, num_hidden_layers=4)


def begin(rank: int, world: int, config: Config) -> list[tuple[float, float]]:
    """Three steps, a checkpoint, and twenty more."""
    trainer, where = open_run(config)
    go(trainer, 3)
    save(trainer, where)
    return go(trainer, 20)


def go_on(rank: int, world: int, config: Config) -> list[tuple[float, float]]:
    """Load, save what was loaded elsewhere, and twenty steps."""
    trainer, where = open_run(config)
    resume(trainer, where, {}, lambda note: None)
    save(trainer, Checkpointer(Path(config.output_dir) / "again", trainer.mesh, config.model))
    return go(trainer, 20)


@pytest.mark.slow
def test_a_dozen_pairs_in_training(tmp_path: Path) -> None:
    """fp32: twenty steps after the change within 1e-5 of those without one; what was loaded is saved bit for bit."""
    seen, folders = {}, {pair: tmp_path / f"{pair[0]}-{pair[1]}" for pair in PAIRS}
    for world in (1, 2, 4):
        with Ranks(world) as ranks:
            for pair, folder in folders.items():
                if pair[0].world == world:
                    seen[pair] = ranks.run(begin, config_of(pair[0], folder, model=SHALLOW, steps=23))[0]
    for world in (1, 2, 4):
        with Ranks(world) as ranks:
            for pair, folder in folders.items():
                if pair[1].world != world:
                    continue
                later = ranks.run(go_on, config_of(pair[1], folder, model=SHALLOW, steps=23))[0]
                drift = torch.tensor(later).sub(torch.tensor(seen[pair])).abs().max(0).values
                assert drift[0] < 1e-5 and drift[1] < 1e-4, f"{pair[0]} -> {pair[1]}: {drift}"
                one, other = (folder / name / "step_00000003" for name in ("checkpoints", "again"))
                assert same(canonical(one, SHALLOW), canonical(other, SHALLOW)), f"{pair[0]} -> {pair[1]}"
    losses = [loss for loss, _ in seen[PAIRS[0]]]
    assert len(seen) == 12 and losses[-1] < losses[0] - 0.05, "the twenty steps learn"
