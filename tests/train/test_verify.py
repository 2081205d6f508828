"""`megallama verify`: planted bugs make it fail and are located; sound layouts pass, from every launcher at hand."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor
from trajectory import MODEL, against_one_process, mesh_of, on_rank, run_config

from distributed import Ranks
from megallama.config import Config, load
from megallama.model import llama
from megallama.optim.bucket import Bucket, Range
from megallama.parallel.layers import VocabEmbedding
from megallama.runtime.mesh import Mesh
from megallama.train import trajectory, verify
from megallama.train.shrink import one_process, replica_batches, shrink
from megallama.train.trainer import NextToken, build_trainer
from megallama.train.trajectory import TOLERANCES, Trajectory, compare

ROOT = Path(__file__).parents[2]
TIED = replace(MODEL, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """One pool of processes for each number of ranks."""
    pools = {world: Ranks(world) for world in (2, 4)}
    yield pools
    for pool in pools.values():
        pool.__exit__()


def replica_sums(name: str, times: int) -> Callable[[], mock._patch]:
    """Partial gradients of replicas over axis `name` are summed `times` times."""
    original = Bucket._sum_replicas

    def wrong(bucket: Bucket, shard: Tensor, which: str) -> None:
        for _ in range(times if which == name else 1):
            original(bucket, shard, which)

    return lambda: mock.patch.object(Bucket, "_sum_replicas", wrong)


def loss_averaged_per_micro_batch() -> mock._patch:
    original = NextToken.__call__

    def wrong(loss, logits, batch):
        total, metrics = original(loss, logits, batch)
        return total / max(1, batch.count) * 6, metrics  # 6: about the mean count, so that no constant gives it away

    return mock.patch.object(NextToken, "__call__", wrong)


def everything_counts_in_the_norm() -> mock._patch:
    original = Bucket.__init__

    def wrong(bucket: Bucket, *args) -> None:
        original(bucket, *args)
        bucket.owned = [Range(0, bucket.size)]

    return mock.patch.object(Bucket, "__init__", wrong)


def attention_across_documents() -> mock._patch:
    original = llama.attention
    return mock.patch.object(llama, "attention", lambda q, k, v, bounds: original(q, k, v, (0, bounds[-1])))


def tokens_off_by_one() -> mock._patch:
    original = VocabEmbedding.forward
    return mock.patch.object(VocabEmbedding, "forward", lambda embed, tokens: original(embed, tokens.clamp(min=1)))


class Bug(NamedTuple):
    """What is planted in the ranks of `config`, and words of the failures that it must cause."""

    plant: Callable[[], mock._patch]
    world: int
    config: Config
    words: str
    located: str


BUGS = {
    "norm gradients not summed": Bug(replica_sums("tp", 0), 2, run_config(tp=2), "gradient error", "model.norm.weight"),
    "K/V replicas not summed": Bug(replica_sums("kv", 0), 4, run_config(tp=4), "gradient error", "1.self_attn.v_proj"),
    "tied embedding not summed": Bug(
        replica_sums("tied", 0), 2, run_config(pp=2, model=TIED), "gradient error", "model.embed_tokens.weight"
    ),
    "tied embedding summed twice": Bug(
        replica_sums("tied", 2), 2, run_config(pp=2, model=TIED), "gradient error", "model.embed_tokens.weight"
    ),
    "loss averaged per micro-batch": Bug(
        loss_averaged_per_micro_batch, 2, run_config(tp=2), "loss error", "lm_head.weight"
    ),
    "replicas counted twice in the norm": Bug(everything_counts_in_the_norm, 2, run_config(tp=2), "norm error", "None"),
    "attention across samples": Bug(
        attention_across_documents, 2, run_config(tp=2), "output of", "('model.layers.0.self_attn (rotary"
    ),
    "wrong tokens": Bug(tokens_off_by_one, 2, run_config(pp=2), "output of", "('model.embed_tokens', "),
}


def with_bug(rank: int, world: int, name: str) -> Trajectory:
    with BUGS[name].plant():
        return on_rank(rank, world, BUGS[name].config, True)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found_and_located(groups, name):
    _, world, config, words, located = BUGS[name]
    ranks = groups[world].run(with_bug, name)
    result = compare(ranks, verify.run_one_process(config, Mesh()), config.model, TOLERANCES["float64"])
    assert any(words in failure for failure in result.failures()), result.failures()
    place = result.first_divergent_output() or result.first_divergent_gradient()
    assert located in str(place)


def test_a_stale_replica_and_a_rank_that_disagrees_are_faults(groups):
    config = run_config(tp=2)
    ranks = groups[2].run(on_rank, config)
    assert not against_one_process(ranks, config).failures()
    replica = next(part for part in ranks[1].weights if not part.owner)
    replica.values.view(torch.int64)[0, 3] += 1  # one bit
    ranks[1].losses[1] += 1e-15
    faults = against_one_process(ranks, config).failures()
    assert len(faults) == 2 and f"replicas of {replica.name}" in str(faults) and "different losses" in str(faults)


def bad_step(rank: int, world: int, config: Config, bad_rank: int) -> list[tuple[bool, list[torch.Tensor]]]:
    """Three steps; in the second, the first unit of `bad_rank` puts out nan. (skipped, weights) after each."""
    parallel = config.parallel
    mesh = mesh_of(parallel.tp, parallel.pp, config.model.num_key_value_heads, False)
    trainer, seen = build_trainer(config, mesh), []
    for step in range(3):
        with ExitStack() as stack:
            if step == 1 and rank == bad_rank:
                unit = next(iter(trainer.stages.values())).units()[0]
                stack.callback(unit.register_forward_hook(lambda module, inputs, output: output * torch.nan).remove)
            micros = replica_batches(config, mesh.dp.size, step, mesh.tp.size)[mesh.dp.rank]
            stats = trainer.step(micros, NextToken(config.model.vocab_size, mesh.tp))
        trainer.optimizer.publish()
        weights = [p.detach().clone() for stage in trainer.stages.values() for p in stage.parameters()]
        seen.append((stats.skipped, weights))
    return seen


@pytest.mark.parametrize(("parallel", "bad_rank"), [({"tp": 2}, 3), ({"pp": 2}, 1), ({"tp": 2, "pp": 2}, 2)])
def test_nan_on_one_rank_makes_all_skip_the_same_step(groups, parallel, bad_rank):
    for ours in groups[4].run(bad_step, run_config(dtype="float32", **parallel), bad_rank):
        assert [skipped for skipped, _ in ours] == [False, True, False]
        first, second, third = (weights for _, weights in ours)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))


PRESETS = {
    "7b": (["--model.preset", "llama2-7b", "--parallel.tp", "2", "--parallel.pp", "2"], 8),
    "70b": (["--model.preset", "llama2-70b", "--parallel.tp", "8", "--parallel.pp", "4"], 64),
    "copied K/V heads": (["--model.num_key_value_heads", "2", "--parallel.tp", "8", "--model.vocab_size", "32001"], 16),
    "interleaved": (
        [
            "--parallel.pp",
            "4",
            "--parallel.vpp",
            "2",
            "--parallel.schedule",
            "interleaved",
            "--parallel.recompute",
            "full",
        ],
        8,
    ),
    "uneven": (
        ["--parallel.pp", "4", "--parallel.layers_per_stage", "[0,12,12,8]", "--model.tie_word_embeddings", "true"],
        4,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_shrinking_keeps_what_matters(name):
    argv, world = PRESETS[name]
    config = load(argv)
    config.validate(world)
    small = shrink(config, world, 3, "float64")
    small.validate(world)
    big, model, tp = config.model, small.model, config.parallel.tp
    assert model.hidden_size <= 256 and model.vocab_size < 256 and small.data.seq_length < 64
    ratio = big.num_attention_heads // big.num_key_value_heads
    assert model.num_attention_heads == ratio * model.num_key_value_heads
    assert max(1, tp // model.num_key_value_heads) == max(1, tp // big.num_key_value_heads)
    assert model.vocab_size % tp == big.vocab_size % tp
    assert model.tie_word_embeddings == big.tie_word_embeddings
    same = ("tp", "pp", "vpp", "schedule", "recompute")
    assert [getattr(small.parallel, k) for k in same] == [getattr(config.parallel, k) for k in same]
    stages = small.parallel.layers_per_stage
    if given := config.parallel.layers_per_stage:
        assert [a < b for a in stages for b in stages] == [a < b for a in given for b in given]
        assert [a == 0 for a in stages] == [a == 0 for a in given]
    assert small.micro_batches(world) >= config.parallel.pp
    one_process(small).validate(1)


def verification(rank: int, world: int, config: Config, broken: bool) -> tuple[bool, str]:
    out = io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(verify.STEPS, {"float64": 1, "float32": 2}))
        if broken:  # the ranks of the layout only, not the one process
            original = trajectory.forward_outputs

            def wrong(trainer, micros):
                if trainer.mesh.world.size > 1:
                    block = next(iter(trainer.stages.values())).blocks[1]
                    block.swiglu.forward = lambda gate_up: gate_up.chunk(2, -1)[1]
                return original(trainer, micros)

            stack.enter_context(mock.patch.object(trajectory, "forward_outputs", wrong))
        console = Console(file=out, width=110, force_terminal=False)
        return verify.Verification(config, torch.device("cpu"), console).run(), out.getvalue()


@pytest.mark.parametrize("broken", (False, True))
def test_the_verdict_is_shared_and_names_the_first_divergent_module(groups, broken):
    config = load(["--model.preset", "llama2-7b", "--parallel.tp", "2", "--parallel.recompute", "full"])
    answers = groups[2].run(verification, config, broken)
    assert [verdict for verdict, _ in answers] == [not broken] * 2
    text = answers[0][1]
    assert answers[1][1] == "" and "float64" in text and "float32" in text
    assert ("FAIL" if broken else "PASS") in text
    assert ("DIFFERS" in text) == broken
    assert ("first divergent module, forward: model.layers.1.mlp (SwiGLU) in micro-batch 0" in text) == broken


def command(folder: Path, *overrides: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.CompletedProcess:
    file = folder / "run.yaml"
    file.write_text("model: {preset: llama2-7b, num_key_value_heads: 8}\ntrain: {compile: false}\n")
    line = [sys.executable, *launcher, "megallama", "verify", "--config", str(file), *overrides]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_a_bare_command_starts_its_own_ranks(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 1 x pp 1 x dp 2 on 2 ranks" in done.stdout and "PASS" in done.stdout


def test_torchrun_decides_the_ranks(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    launcher = (*launcher, "--nproc-per-node", "2", "-m")
    done = command(tmp_path, "--parallel.pp", "2", "--parallel.schedule", "zero-bubble", launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp 1 x pp 2 x dp 1 on 2 ranks" in done.stdout and done.stdout.count("PASS") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--parallel.tp", "3"), "num_attention_heads=32 is not divisible by parallel.tp=3"),
        (("--parallel.tp", "32", "--parallel.pp", "16"), "512 ranks are too many"),
    ],
)
def test_user_errors_are_one_line(tmp_path, overrides, words):
    done = command(tmp_path, *overrides)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and words in done.stderr
