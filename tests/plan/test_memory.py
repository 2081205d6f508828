"""Bytes a rank against sums over the whole model, the buckets and programs themselves, and published formulas.

`test_memory_measured.py` counts what the engine really holds.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config import Config, load
from megallama.optim import Zero1, bucket, zero1
from megallama.parallel import loss
from megallama.pipeline import build, peak_activations, simulate, standard_cost
from megallama.plan import activations, describe, memory, parameters, rank_memory, stage_layers
from megallama.plan.activations import kept_bytes, waiting_bytes
from megallama.plan.job import MEGATRON_2021, Job, Layout, Shape, job_of
from megallama.plan.memory import job_memory, memory_over_time, program_moments, stage_buckets
from megallama.runtime.mesh import sketch
from megallama.train.trainer import build_stages

BASE = (
    "--model.hidden_size 256 --model.intermediate_size 384 --model.num_hidden_layers 8 --model.num_attention_heads 8 "
)
BASE += "--model.num_key_value_heads 2 --model.vocab_size 1000 --train.global_batch_size 64 --data.seq_length 128 "

GPT = Shape(layers=4, hidden=512, heads=8, kv_heads=8, intermediate=2048, vocab=1024, gated=False)
SEQ, SAMPLES = 256, 2


def config(text: str = "") -> Config:
    return load((BASE + text).split())


def gpt(tp: int = 1, sequence_parallel: bool = True, recompute: str = "none") -> Job:
    layout = Layout(tp, 1, 1, SAMPLES, 1, "1f1b", recompute, sequence_parallel, (4,))
    return Job(GPT, SEQ, SAMPLES, layout, engine=MEGATRON_2021)


@pytest.mark.parametrize(
    ("dtype", "weights", "gradients", "masters", "moments"),
    [("bfloat16", 2, 4, 4, 8), ("float32", 4, 4, 0, 8), ("float64", 8, 8, 0, 16)],
)
def test_one_rank_holds_bytes_by_type(dtype: str, weights: int, gradients: int, masters: int, moments: int) -> None:
    c = config(f"--train.dtype {dtype}")
    (row,) = rank_memory(c, 1)
    n = parameters(c.model)
    assert row[:4] == (n * weights, n * gradients, n * masters, n * moments)
    assert row.total == sum(row)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize(
    "layout", ["--parallel.pp 4", "--parallel.pp 2 --parallel.vpp 2 --parallel.schedule interleaved"]
)
def test_pipeline_ranks_add_up_to_the_model(layout: str, tied: str) -> None:
    c = config(f"{layout} --model.tie_word_embeddings {tied} --train.dtype float32")
    rows = rank_memory(c, c.parallel.pp)
    copy = 1000 * 256 if tied == "true" else 0  # the last stage holds a copy of a tied embedding
    assert sum(row.weights for row in rows) == 4 * (parameters(c.model) + copy)


def test_data_parallel_ranks_split_the_optimizer_alone() -> None:
    one, four = (rank_memory(config(), world)[0] for world in (1, 4))
    assert (four.weights, four.gradients) == (one.weights, one.gradients)
    assert four.masters == -(-parameters(config().model) // 4) * 4
    assert four.moments == 2 * four.masters


def test_an_optimizer_that_is_not_sharded_is_whole_on_every_replica() -> None:
    job = gpt()
    wide = replace(job, layout=job.layout._replace(dp=8), global_batch=8 * SAMPLES)
    assert job_memory(wide)[0][:4] == job_memory(job)[0][:4]
    weights, gradients, masters, moments = job_memory(job)[0][:4]
    assert (gradients, masters, moments) == (weights, 2 * weights, 4 * weights)  # 16 bytes a parameter


@pytest.mark.parametrize("head", ["lm", "tied", "scalar"])
@pytest.mark.parametrize(("tp", "pp", "dp", "vpp"), [(1, 1, 1, 1), (1, 1, 3, 1), (4, 2, 3, 1), (2, 2, 1, 2)])
def test_buckets_are_the_optimizers_own(
    tp: int, pp: int, dp: int, vpp: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero1, "BUCKET_ELEMENTS", 50_000)  # so that a stage has several
    monkeypatch.setattr(memory, "BUCKET_ELEMENTS", 50_000)
    chunks = f"--parallel.vpp {vpp} --parallel.schedule interleaved" if vpp > 1 else ""
    c = config(f"--parallel.tp {tp} --parallel.pp {pp} {chunks} --model.vocab_size 997 --model.num_hidden_layers 5")
    if head != "lm":
        changed = {"tie_word_embeddings": True} if head == "tied" else {"head": "scalar"}
        c = replace(c, model=replace(c.model, **changed))
    c = replace(c, train=replace(c.train, global_batch_size=4 * dp))
    world = tp * pp * dp
    job, seen, early_ones = job_of(c, world), set(), 0
    for rank in range(world):
        mesh = sketch(rank, world, tp, pp, c.model.num_key_value_heads, c.model.tied)
        stages = build_stages(c, mesh)
        for number, buckets in Zero1(stages, mesh, c.optim).buckets.items():
            last_to_come = [*stages[number].blocks[:1], *filter(None, [stages[number].embed])]
            weights = {id(weight) for module in last_to_come for weight in module.parameters()}
            late = [b for b in buckets if any(id(held.weight) in weights for held in b.held)]
            early = [b for b in buckets if b not in late]
            for own, predicted in zip((early, late), stage_buckets(job, number), strict=True):
                assert sorted(b.grads.numel() for b in own) == sorted(predicted)
            seen.add(number)
            early_ones += len(early)
    assert early_ones and seen == set(range(pp * vpp))


def test_layers_are_even_where_the_layout_does_not_say() -> None:
    job = job_of(config("--parallel.pp 2 --parallel.layers_per_stage [4,4]"), 2)
    assert job_memory(replace(job, layout=job.layout._replace(layers_per_stage=()))) == job_memory(job)


def test_constants_are_the_engines() -> None:
    assert (memory.ALIGN, memory.BUCKET_ELEMENTS) == (bucket.ALIGN, zero1.BUCKET_ELEMENTS)
    assert loss.CHUNK_BYTES["cuda"] == activations.CHUNK_BYTES


def test_kept_bytes_by_hand() -> None:
    job = job_of(config(), 1)
    tokens, hidden, kv, width, heads = 128, 256, 64, 384, 8
    norms = 2 * (tokens * (4 * hidden + 4) + 2 * 2 * tokens * hidden)
    selective = norms + 2 * tokens * (hidden + 2 * kv + hidden + 4 * width)
    assert kept_bytes(job, "selective") == selective
    assert kept_bytes(job, "none") == selective + tokens * (2 * (hidden + kv) + 4 * heads)
    assert kept_bytes(job, "full") == 2 * tokens * hidden
    qkv, o, gate_up, down = hidden + 2 * kv + hidden, 2 * hidden, 2 * width + hidden, hidden + width
    assert waiting_bytes(job) == 2 * tokens * (qkv + o + gate_up + down)


def test_tensor_parallel_ranks_split_all_but_copied_heads_and_gathered_gradients() -> None:
    one, four = (job_of(config(f"--parallel.tp {tp}"), tp) for tp in (1, 4))
    kv, row = 2 * 128 * 64, 2 * 128 * 256
    copies = 3 * (kv // 2 - kv // 4)  # 2 K/V heads on 4 ranks: q's neighbours k and v, and k once more, turned
    assert kept_bytes(four, "none") == kept_bytes(one, "none") // 4 + copies
    assert waiting_bytes(four) == waiting_bytes(one) // 4 + 2 * (kv // 2 - kv // 4) + 2 * (row - row // 4)


def test_published_bytes_a_layer_of_gpt() -> None:
    """Korthikanti et al. 2022, table 2: bytes of one layer over sequence * samples * hidden."""
    unit, scores = SEQ * SAMPLES * GPT.hidden, 5 * GPT.heads * SEQ / GPT.hidden
    for tp in (1, 4):
        assert kept_bytes(gpt(tp, False), "none") == unit * (10 + 24 / tp + scores / tp)
        assert kept_bytes(gpt(tp, True), "none") == unit * (34 + scores) / tp
        assert kept_bytes(gpt(tp, False), "selective") == unit * (10 + 24 / tp)
        assert kept_bytes(gpt(tp, True), "selective") == unit * 34 / tp
    assert kept_bytes(gpt(4, False), "full") == 2 * unit


def test_recomputation_needs_one_block_more_at_work() -> None:
    layers, head = GPT.layers, SEQ * SAMPLES * (2 * 2 * GPT.hidden + 4 * GPT.vocab)
    for recompute in ("none", "selective", "full"):
        job = gpt(recompute=recompute)
        (row,) = job_memory(job)
        kept = layers * kept_bytes(job, recompute)
        working = kept_bytes(job, "none") - kept_bytes(job, recompute)
        assert row.activations + row.logits == kept + max(head, working)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_moments_hold_as_many_micro_batches_as_the_program(schedule: str) -> None:
    for ranks, micros in ((1, 3), (2, 1), (4, 2), (4, 12), (3, 9)):
        vpp = 2 if schedule == "interleaved" and ranks > 1 and micros % ranks == 0 else 1
        program = build(schedule, ranks, micros, vpp)
        moments = program_moments(schedule, ranks, micros, vpp)
        most = [max(sum(m.held) + sum(m.waiting) for m in row if m.kind != "F") for row in moments]
        assert most == peak_activations(program)
        if schedule == "1f1b":
            assert most == [min(micros, ranks - rank) for rank in range(ranks)]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
def test_more_micro_batches_than_enough_need_no_more_memory(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(pp: int, vpp: int, micros: int) -> list[int]:
        text = f"--parallel.pp {pp} --parallel.vpp {vpp} --parallel.schedule {schedule} --model.num_hidden_layers 13 "
        c = config(text + f"--train.global_batch_size {micros}")
        return [sum(row) for row in job_memory(job_of(c, pp))]

    row, batch = 2 * 128 * 256, 3 * 8 * 128
    for pp, vpp in ((2, 1), (3, 1), (4, 1)) if schedule != "interleaved" else ((2, 2), (3, 2), (4, 3)):
        enough = peaks(pp, vpp, 4 * pp)
        monkeypatch.setattr(memory, "ENOUGH", 1000)
        for more in (5, 7, 8):
            all_of_them = peaks(pp, vpp, more * pp)
            for short, whole in zip(enough, all_of_them, strict=True):
                assert abs(whole - short - (more - 4) * pp * batch) <= row  # equal times may swap two transfers
        monkeypatch.undo()


def test_activations_follow_schedule_and_recomputation() -> None:
    def first(text: str) -> int:
        return rank_memory(config("--parallel.pp 4 --parallel.layers_per_stage [2,2,2,2] " + text), 4)[0].activations

    assert first("--parallel.schedule gpipe") > 15 * first("")  # 64 micro-batches, not 4
    assert first("--parallel.recompute full") < first("--parallel.recompute selective") < first("")


def test_put_off_weight_gradients_outweigh_the_inputs_that_full_recomputation_keeps() -> None:
    text = "--parallel.pp 4 --parallel.layers_per_stage [2,2,2,2] --parallel.recompute full --parallel.schedule "
    plain, split = (rank_memory(config(text + name), 4) for name in ("1f1b", "zero-bubble"))
    waiting = 2 * waiting_bytes(job_of(config(text + "zero-bubble"), 4))
    assert split[3].activations > plain[3].activations + 3 * waiting  # the last rank lets three wait
    assert split[0].activations > plain[0].activations


def test_reduced_gradients_and_the_batch_lie_in_the_buffers() -> None:
    def total(world: int) -> int:
        return rank_memory(config("--data.seq_length 16 --train.dtype float32"), world)[0].buffers

    assert total(1) == 64 * 16 * 3 * 8
    assert total(2) == 32 * 16 * 3 * 8 + 4 * parameters(config().model) // 2


@settings(max_examples=25, deadline=None)
@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    pp=st.integers(1, 4),
    rounds=st.integers(1, 3),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_memory_over_time_reaches_the_peak_and_returns_to_the_floor(
    schedule: str, pp: int, rounds: int, recompute: str
) -> None:
    vpp = 2 if schedule == "interleaved" and pp > 1 else 1
    text = f"--parallel.pp {pp} --parallel.vpp {vpp} --parallel.schedule {schedule} --parallel.recompute {recompute} "
    job = job_of(config(text + f"--train.global_batch_size {pp * rounds}"), pp)
    program = build(schedule, pp, pp * rounds, vpp)
    events = simulate(program, standard_cost(program))
    transfers, batch = (2 * pp + 6) * 2 * 128 * 256, 24 * 128 * job.micros
    for rank, (line, row) in enumerate(zip(memory_over_time(job, events), job_memory(job), strict=True)):
        assert all(before < after for (before, _), (after, _) in pairwise(line))
        floor = sum(row[:4])
        assert line[-1] == (max(e.end for e in events if e.rank == rank), floor)
        assert min(size for _, size in line) == floor
        assert 0 <= row.total - batch - max(size for _, size in line) <= transfers


def test_describe_names_layout_parameters_and_bytes() -> None:
    c = config("--parallel.tp 2 --parallel.pp 2 --optim.warmup_steps 9 --train.steps 5")
    text = describe(c, 8)
    layers = stage_layers(c.model, c.parallel, 128)
    for words in (
        "8 = tp 2 x pp 2 x dp 2",
        f"{parameters(c.model):,} parameters",
        " + ".join(map(str, layers)),
        "32 micro-batches of 1",
        "never reached",
        "pp rank 1",
    ):
        assert words in text
    even = config("--parallel.pp 4 --model.vocab_size 1 --parallel.layers_per_stage [2,2,2,2]")
    assert f"bubble {100 * 3 / (64 + 3):.1f} %" in describe(even, 4)
