"""The master test: every layout, schedule and feature follows the trajectory of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from trajectory import MODEL, SAMPLES, against_one_process, assemble, on_rank, oracle, run_config

from distributed import Ranks
from megallama.config import Config
from megallama.model.initial import RandomWeights
from megallama.optim import Zero1
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import sketch
from megallama.train.probe import Part
from megallama.train.trainer import build_stages

FACTORINGS = [
    (tp, pp, world // tp // pp)
    for world in (1, 2, 4, 8)
    for tp in (1, 2, 4, 8)
    for pp in (1, 2, 4, 8)
    if world % (tp * pp) == 0
]
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
LAYOUTS = [(*f, schedule) for f in FACTORINGS for schedule in (SCHEDULES if f[1] > 1 else ("1f1b",))]

TIED = replace(MODEL, tie_word_embeddings=True)
DEEP = replace(MODEL, num_hidden_layers=4)

FEATURES: dict[str, tuple[int, Config]] = {
    "selective recompute": (4, run_config(tp=2, pp=2, recompute="selective")),
    "selective recompute, deferred weight gradients": (
        4,
        run_config(tp=2, pp=2, recompute="selective", schedule="zero-bubble"),
    ),
    "full recompute": (4, run_config(tp=4, recompute="full")),
    "full recompute, deferred weight gradients": (4, run_config(tp=2, pp=2, recompute="full", schedule="zero-bubble")),
    "full recompute, chunks": (2, run_config(model=DEEP, pp=2, vpp=2, schedule="interleaved", recompute="full")),
    "uneven stages": (4, run_config(model=DEEP, tp=2, pp=2, layers_per_stage=(3, 1))),
    "uneven chunks": (2, run_config(model=DEEP, pp=2, vpp=2, layers_per_stage=(1, 2, 1, 0), schedule="interleaved")),
    "first stage without layers": (2, run_config(pp=2, layers_per_stage=(0, 2))),
    "last stage without layers": (2, run_config(pp=2, layers_per_stage=(2, 0), schedule="zero-bubble")),
    "both ends without layers": (4, run_config(pp=4, layers_per_stage=(0, 1, 1, 0), schedule="gpipe")),
    "tied, one stage": (2, run_config(model=TIED, tp=2)),
    "tied, deferred weight gradients": (1, run_config(model=TIED, schedule="zero-bubble")),
    "tied, sharded optimizer": (4, run_config(model=TIED, tp=2)),
    "tied, two stages": (8, run_config(model=TIED, tp=2, pp=2, schedule="zero-bubble")),
    "tied, chunks": (
        4,
        run_config(model=replace(TIED, num_hidden_layers=4), pp=2, vpp=2, schedule="interleaved", micro=1),
    ),
    "tied, four stages, no layers at the ends": (8, run_config(model=TIED, pp=4, layers_per_stage=(0, 1, 1, 0))),
    "tied, copied K/V heads": (8, run_config(model=TIED, tp=4, pp=2, recompute="full")),
    "micro-batches of 1": (2, run_config(tp=2, micro=1)),
    "micro-batches of 4": (4, run_config(tp=2, pp=2, micro=4, schedule="zero-bubble")),
    "one micro-batch": (2, run_config(tp=2, micro=8)),
    "fewer micro-batches than stages": (4, run_config(model=DEEP, pp=4, micro=4)),
    "fewer micro-batches than stages, deferred": (4, run_config(model=DEEP, pp=4, micro=8, schedule="zero-bubble")),
    "fewer micro-batches than stages, gpipe": (4, run_config(model=DEEP, pp=4, micro=4, schedule="gpipe")),
    "odd data parallelism": (3, replace(run_config(), train=replace(run_config().train, global_batch_size=12))),
    "odd pipeline": (3, run_config(model=DEEP, pp=3)),
    "vocabulary shards of nothing but padding": (8, run_config(model=replace(MODEL, vocab_size=9), tp=8)),
    "one K/V head on eight ranks": (8, run_config(model=replace(MODEL, num_key_value_heads=1), tp=8)),
    "documents": (4, replace(run_config(tp=2, pp=2), data=replace(run_config().data, mask_documents=True))),
    "no clipping, no decay": (
        2,
        replace(run_config(tp=2), optim=replace(run_config().optim, clip_grad=0.0, weight_decay=0.0)),
    ),
}

FLOAT32 = [  # tp, pp, dp, schedule, recompute
    (2, 1, 1, "1f1b", "none"),
    (4, 1, 1, "1f1b", "selective"),
    (1, 2, 2, "zero-bubble", "none"),
    (1, 1, 4, "1f1b", "none"),
    (2, 2, 1, "interleaved", "full"),
    (2, 2, 2, "1f1b", "none"),
]


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """One pool of processes for each number of ranks."""
    pools = {world: Ranks(world) for world in (1, 2, 3, 4, 8)}
    yield pools
    for pool in pools.values():
        pool.__exit__()


def layout_config(tp: int, pp: int, dp: int, schedule: str, **given) -> Config:
    """A layer a stage at least; two micro-batches a replica, in a pipeline four or one for each rank, if there are."""
    vpp = 2 if schedule == "interleaved" else 1
    model = replace(MODEL, num_hidden_layers=max(2, pp * vpp))
    micros = max(4, pp) if pp > 1 else 2
    micro = max(1, SAMPLES // dp // micros)
    return run_config(tp=tp, pp=pp, vpp=vpp, schedule=schedule, micro=micro, model=model, **given)


def check(groups: dict[int, Ranks], world: int, config: Config) -> None:
    config.validate(world)
    result = against_one_process(groups[world].run(on_rank, config), config)
    assert not result.failures(), result.failures()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "tp{}-pp{}-dp{}-{}".format(*x))
def test_every_layout_and_schedule(groups, layout):
    tp, pp, dp, schedule = layout
    check(groups, tp * pp * dp, layout_config(tp, pp, dp, schedule))


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(groups, feature):
    world, config = FEATURES[feature]
    check(groups, world, config)


@pytest.mark.parametrize("layout", FLOAT32, ids=lambda x: "tp{}-pp{}-dp{}-{}-{}".format(*x))
def test_float32_stays_close_for_twenty_steps(groups, layout):
    tp, pp, dp, schedule, recompute = layout
    check(groups, tp * pp * dp, layout_config(tp, pp, dp, schedule, steps=20, dtype="float32", recompute=recompute))


def test_the_data_can_be_learnt():
    """Else weights and losses would hardly depend on the gradients."""
    losses = oracle(run_config(steps=20, dtype="float32")).losses
    assert losses[-1] < 0.95 * losses[0]


def test_recompute_changes_no_bit_and_runs_repeat_bitwise(groups):
    def run(recompute: str):
        ranks = groups[4].run(on_rank, run_config(dtype="float32", tp=2, pp=2, recompute=recompute))
        parts = [part for rank in ranks for part in (*rank.weights, *rank.gradients)]
        return [ranks[0].losses, ranks[0].norms], parts

    numbers, parts = run("none")
    for recompute in ("none", "selective", "full"):
        others, other_parts = run(recompute)
        assert others == numbers, recompute
        for mine, theirs in zip(parts, other_parts, strict=True):
            assert mine[:2] == theirs[:2] and torch.equal(mine.values, theirs.values), (recompute, mine.name, mine.rect)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("factoring", FACTORINGS, ids=lambda x: "tp{}-pp{}-dp{}".format(*x))
def test_initial_weights_are_the_same_bits_in_every_layout(factoring, tied):
    tp, pp, dp = factoring
    config = layout_config(tp, pp, dp, "interleaved" if pp > 1 else "1f1b")
    model = replace(config.model, tie_word_embeddings=tied)
    source, parts = RandomWeights(model, 7), []
    for rank in range(tp * pp * dp):
        mesh = sketch(rank, tp * pp * dp, tp, pp, model.num_key_value_heads, tied)
        optimizer = Zero1(build_stages(replace(config, model=model), mesh), mesh, config.optim)
        for slot, states in optimizer.slots():
            source.read(slot.name, slot.rect, states["weight"])
            parts.append(Part(slot.name, slot.rect, states["weight"], slot.owner))
    for name, tensor in assemble(parts, model).items():
        rows, cols = matrix(source.shapes[name])
        whole = torch.empty(rows, cols, dtype=torch.float64)
        source.read(name, Rect(0, rows, 0, cols), whole)
        assert torch.equal(tensor, whole), name
