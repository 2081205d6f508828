"""The predicted step: what it is made of, and that short programs tell the time of long ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallama.config import Config, ModelConfig
from megallama.pipeline import simulate
from megallama.plan.cluster import load_cluster
from megallama.plan.cost import parameters, train_flops_per_token
from megallama.plan.job import COMPILED, MEGALLAMA, MEGATRON_2021, Job, Layout, Shape, job_of, shape_of
from megallama.plan.machine import Constants, Machine, fitted
from megallama.plan.step import actions_of, cost_of, pipeline_seconds, predict, program_of, tail
from megallama.plan.work import (
    block_parameters,
    block_seconds,
    elementwise_bytes,
    model_flops,
    regathered_seconds,
    stage_parameters,
)
from megallama.presets import PRESETS

RSC = load_cluster("rsc")
MACHINE = Machine(RSC, fitted())
SEVEN = Shape(32, 4096, 32, 32, 11008, 32000)
LAYOUT = Layout(tp=2, pp=4, dp=2, micro_batch=1)


def job(micros: int = 8, shape: Shape = SEVEN, **layout) -> Job:
    given = LAYOUT._replace(**layout)
    return Job(shape, 4096, micros * given.micro_batch * given.dp, given)


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 4},
        {"pp": 4, "vpp": 2, "schedule": "interleaved"},
        {"pp": 4, "schedule": "zero-bubble"},
        {"pp": 4, "schedule": "gpipe"},
        {"pp": 3, "layers_per_stage": (9, 12, 11)},
        {"pp": 4, "recompute": "full", "micro_batch": 2},
    ],
)
@pytest.mark.parametrize("micros", [4, 16, 48, 96])
def test_short_programs_tell_the_time_of_long_ones(layout: dict, micros: int):
    if layout["pp"] == 3:
        micros += micros % 3
    asked = job(micros, **layout)
    actions = actions_of(asked, MACHINE)
    program = program_of(asked.layout.schedule, asked.layout.pp, micros, asked.layout.vpp)
    whole = max(event.end for event in simulate(program, cost_of(actions), actions.hop))
    assert pipeline_seconds(asked, actions) == pytest.approx(whole, rel=2e-3)


def test_the_parts_make_the_whole():
    for layout in ({}, {"recompute": "full"}, {"schedule": "zero-bubble"}, {"pp": 1, "dp": 8}):
        found = predict(job(**layout), MACHINE)
        assert sum(found[1:]) == pytest.approx(found.seconds)
        assert all(part >= 0 for part in found)


def test_what_must_cost_time_does():
    base = predict(job(), MACHINE).seconds
    assert predict(job(recompute="full"), MACHINE).seconds > predict(job(recompute="selective"), MACHINE).seconds > base
    assert predict(job(micros=16), MACHINE).seconds > 1.5 * base
    assert predict(job(schedule="zero-bubble"), MACHINE).bubble < predict(job(), MACHINE).bubble
    chunks = predict(job(schedule="interleaved", vpp=4), MACHINE)
    assert chunks.bubble < 0.5 * predict(job(), MACHINE).bubble
    slower = Machine(load_cluster("production"), fitted())
    assert 0.85 < base / predict(job(), slower).seconds < 1
    assert predict(job(), Machine(load_cluster("h100"), fitted())).seconds < 0.6 * base


def test_with_a_perfect_machine_a_large_model_runs_near_its_peak():
    perfect = Machine(RSC, Constants(1, 1, 1, 1, 0, 0, 0, 0))
    asked = Job(SEVEN, 4096, 32, Layout(1, 1, 8, 4))
    seconds = predict(asked, perfect).seconds
    assert 0.7 < model_flops(asked) / seconds / 8 / 312e12 < 1


def test_counts_are_those_of_the_configured_model():
    for shape in PRESETS.values():
        config = Config(model=ModelConfig(**shape))
        counted = shape_of(config.model)
        asked = Job(counted, 4096, 8, Layout(1, 1, 8, 1))
        assert stage_parameters(asked, 0) == parameters(config.model)
        assert model_flops(asked) == train_flops_per_token(config.model, 4096) * 8 * 4096


def test_the_stages_are_the_engines():
    config = replace(Config(), model=ModelConfig(**PRESETS["llama2-70b"]))
    config = replace(config, parallel=replace(config.parallel, pp=8, tp=8))
    assert sum(job_of(config, 64).layout.layers_per_stage) == 80


def test_second_gathers_hide_behind_products_unless_weight_gradients_wait():
    slow = Machine(replace(RSC, link_gbps=1.0), fitted())
    gather = slow.gathered(4096 * 4096 * 2, slow.group(2, 1))
    products = sum(slow.matmul(4096, 4096, n) for n in (6144, 11008))
    assert regathered_seconds(job(), slow) == (pytest.approx(2 * gather - products), 0.0)
    assert regathered_seconds(job(schedule="zero-bubble"), slow) == (0.0, 2 * gather)
    for layout in ({"tp": 1}, {"sequence_parallel": False}):
        assert regathered_seconds(job(**layout), slow) == (0.0, 0.0)
    assert regathered_seconds(job(), MACHINE) == (0.0, 0.0), "NVLink is faster than the products"


def test_what_the_engine_does_not_fuse_costs_time():
    compiled, plain = replace(job(), engine=COMPILED), job()
    more = elementwise_bytes(plain) / elementwise_bytes(compiled)
    assert 3 < more < 5 and predict(plain, MACHINE).seconds > predict(compiled, MACHINE).seconds
    added = 12 * block_parameters(plain) / MACHINE.bandwidth
    fused = replace(plain, engine=MEGALLAMA._replace(fused_accumulation=True))
    gap = block_seconds(plain, MACHINE).weights - block_seconds(fused, MACHINE).weights
    assert gap == pytest.approx(added), "product and sum are read, the sum is written: 12 bytes in fp32"


def test_a_step_is_no_shorter_than_what_its_ranks_send():
    slow = Machine(replace(RSC, fabric_gbps=0.05), fitted())
    asked = job(16, tp=1, pp=2, vpp=4, dp=8, schedule="interleaved")
    hop = actions_of(asked, slow).hop
    assert predict(asked, slow).seconds > 16 * 7 * hop, "of 8 stages, 4 forwards and 3 backwards leave rank 0"


@pytest.mark.parametrize(("layers", "micros"), [(33, 128), (30, 128), (19, 64)])
def test_uneven_stages_are_never_quicker_than_their_busiest_rank(layers: int, micros: int):
    asked = job(micros, SEVEN._replace(layers=layers), tp=1, dp=1, vpp=2, schedule="interleaved")
    actions = actions_of(asked, MACHINE)
    whole = max(event.end for event in simulate(program_of("interleaved", 4, micros, 2), cost_of(actions), actions.hop))
    assert pipeline_seconds(asked, actions) == pytest.approx(whole, rel=2e-3)


def test_buckets_hide_behind_the_last_backwards_all_but_one():
    alone = job(pp=1, tp=1, dp=256)
    actions = actions_of(alone, MACHINE)
    group, held = MACHINE.group(256, 1), stage_parameters(alone, 0)
    buckets = -(-held // (1 << 25))
    reduced = MACHINE.gathered(4 * held, group, buckets)
    gathered = MACHINE.gathered(2 * held, group, buckets)
    exposed, _ = tail(alone, MACHINE, 0, actions)
    assert reduced < actions.backward[0] and exposed == pytest.approx((reduced + gathered) / buckets)
    slow = Machine(replace(RSC, fabric_gbps=0.05), fitted())
    exposed, _ = tail(alone, slow, 0, actions)
    sums = slow.gathered(4 * held, group, buckets) + slow.gathered(2 * held, group, buckets)
    assert exposed == pytest.approx(sums - actions.backward[0] - actions.forward[0])


def test_hops_hold_up_an_engine_that_waits_for_them():
    shape = SEVEN._replace(gated=False)
    ours, theirs = job(shape=shape, dp=8), replace(job(shape=shape, dp=8), engine=MEGATRON_2021)
    plain = actions_of(ours, MACHINE)
    waits = actions_of(theirs, MACHINE)
    assert waits.hop == plain.hop > 0
    assert predict(theirs, MACHINE).seconds > predict(ours, MACHINE).seconds
