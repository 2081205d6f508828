"""Bytes a rank against sums over the whole model, and the words of --dry-run."""

from __future__ import annotations

import pytest

from megallama.config import Config, load
from megallama.plan import describe, parameters, rank_memory, stage_layers
from megallama.plan.memory import kept_bytes

BASE = (
    "--model.hidden_size 256 --model.intermediate_size 384 --model.num_hidden_layers 8 --model.num_attention_heads 8 "
)
BASE += "--model.num_key_value_heads 2 --model.vocab_size 1000 --train.global_batch_size 64 --data.seq_length 128 "


def config(text: str = "") -> Config:
    return load((BASE + text).split())


@pytest.mark.parametrize(
    ("dtype", "weights", "gradients", "masters", "moments"),
    [("bfloat16", 2, 4, 4, 8), ("float32", 4, 4, 0, 8), ("float64", 8, 8, 0, 16)],
)
def test_one_rank_holds_bytes_by_type(dtype: str, weights: int, gradients: int, masters: int, moments: int) -> None:
    c = config(f"--train.dtype {dtype}")
    (row,) = rank_memory(c, 1)
    n = parameters(c.model)
    assert row[:4] == (n * weights, n * gradients, n * masters, n * moments)


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


def test_activations_follow_schedule_and_recomputation() -> None:
    def first(text: str) -> int:
        return rank_memory(config("--parallel.pp 4 --parallel.layers_per_stage [2,2,2,2] " + text), 4)[0].activations

    one_layer = kept_bytes(config())
    assert first("") == 4 * 2 * one_layer  # 1F1B: as many micro-batches as ranks
    assert first("--parallel.schedule gpipe") == 64 * 2 * one_layer  # all of them
    assert first("--parallel.recompute full") < first("--parallel.recompute selective") < first("")


def test_kept_bytes_by_hand() -> None:
    tokens, hidden, width, kv = 128, 256, 384, 64
    numbers = 6 * hidden + 2 * kv + 3 * width
    assert kept_bytes(config("--parallel.recompute selective")) == tokens * numbers * 2
    assert kept_bytes(config()) == tokens * (numbers * 2 + 8 * 4)
    assert kept_bytes(config("--parallel.recompute full")) == tokens * hidden * 2


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
