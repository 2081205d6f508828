"""Resuming: the same bits in the same layout, the same run in another, and the newest valid checkpoint after damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distributed import run_ranks
from megallama.checkpoint import Checkpointer, Store, checkpoint_folders, checkpointer
from megallama.config import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import IGNORE, Batch
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import build_mesh
from megallama.train.pretrain import resume
from megallama.train.trainer import NextToken, Trainer, build_trainer

ROWS, LENGTH, VOCAB = 8, 12, 37
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    initializer_range=0.1,
)
TIED = replace(MODEL, tie_word_embeddings=True)
STATES = ("weight", "exp_avg", "exp_avg_sq")
Canonical = dict[tuple[str, str], Tensor]


class Layout(NamedTuple):
    """Sizes of the three axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def config_of(layout: Layout, folder: Path, dtype: str = "float32", model: ModelConfig = MODEL, **sections) -> Config:
    return Config(
        model=model,
        parallel=ParallelConfig(tp=layout.tp, pp=layout.pp),
        train=TrainConfig(steps=8, micro_batch_size=2, global_batch_size=ROWS, dtype=dtype),
        optim=sections.get("optim", OptimConfig(lr=1e-3, warmup_steps=1, eps=1e-5)),
        checkpoint=sections.get("checkpoint", CheckpointConfig(async_save=False)),
        output_dir=str(folder),
    )


def open_run(config: Config) -> tuple[Trainer, Checkpointer]:
    """Fresh weights on the default process group, and the run's checkpoints."""
    p, m, c = config.parallel, config.model, config.checkpoint
    mesh = build_mesh(p.tp, p.pp, m.num_key_value_heads, m.tie_word_embeddings, torch.device("cpu"))
    root = Path(config.output_dir) / "checkpoints"
    return build_trainer(config, mesh), Checkpointer(root, mesh, m, c.keep, c.async_save)


def go(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps, on rows of unequal length and unequal numbers of labels."""
    mesh, loss, seen = trainer.mesh, NextToken(VOCAB, trainer.mesh.tp), []
    for _ in range(steps):
        random = torch.Generator().manual_seed(trainer.done)
        rows = []
        for n in range(ROWS):
            tokens = torch.randint(VOCAB, (LENGTH + 1 - n % 3,), generator=random)
            labels = tokens[1:].clone()
            labels[: n % 4] = IGNORE
            rows.append((tokens[:-1], labels))
        mine = rows[mesh.dp.rank :: mesh.dp.size]
        stats = trainer.step([Batch.pack(mine[at : at + 2], mesh.tp.size) for at in range(0, len(mine), 2)], loss)
        seen.append((stats.loss, stats.grad_norm))
    return seen


def save(trainer: Trainer, to: Checkpointer) -> None:
    assert trainer.optimizer is not None
    meta = {"consumed_samples": trainer.done * ROWS, "updates": trainer.optimizer.updates, "fingerprints": {}}
    to.save(trainer.done, trainer.optimizer.slots(), meta)


def states(trainer: Trainer) -> list[Tensor]:
    """All that must survive: masters, both moments, and the weights that this rank computes with."""
    assert trainer.optimizer is not None
    trainer.optimizer.publish()
    flat = [getattr(bucket, field) for buckets in trainer.optimizer.buckets.values() for bucket in buckets
            for field in ("master", "exp_avg", "exp_avg_sq", "weights")]  # fmt: skip
    return [x.clone() for x in flat]


class Outcome(NamedTuple):
    """What a rank ends with."""

    steps: list[tuple[float, float]]
    states: list[Tensor]


def straight(rank: int, world: int, config: Config) -> Outcome:
    """Six steps; after the third a checkpoint in the foreground, and one in the background of the next three steps."""
    trainer, foreground = open_run(config)
    folder = Path(config.output_dir) / "background"
    background = Checkpointer(folder, trainer.mesh, config.model, 0, True)
    seen = go(trainer, 3)
    save(trainer, foreground)
    save(trainer, background)
    seen += go(trainer, 3)
    background.wait()
    return Outcome(seen, states(trainer))


def resumed(rank: int, world: int, config: Config) -> Outcome:
    """Three steps from the checkpoint of the third."""
    trainer, where = open_run(config)
    assert resume(trainer, where, {}, lambda note: None) == 3 * ROWS
    assert trainer.done == 3
    return Outcome(go(trainer, 3), states(trainer))


def new_processes(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_ranks`, but one rank gets a process of its own as well."""
    if world > 1:
        return run_ranks(world, fn, *args)
    with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
        return [pool.submit(one_process, fn, args).result(120)]


def one_process(fn: Callable[..., Any], args: tuple) -> Any:
    torch.set_num_threads(1)
    return fn(0, 1, *args)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)],
    ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout),
)
def test_resuming_continues_bitwise(tmp_path: Path, layout: Layout) -> None:
    """Losses, norms, weights and moments; and saving in the background stores the same bytes."""
    config = config_of(layout, tmp_path)
    whole = new_processes(layout.world, straight, config)
    later = new_processes(layout.world, resumed, config)
    for one, other in zip(whole, later, strict=True):
        assert other.steps == one.steps[3:]
        assert all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    assert whole[0].steps[0][0] != whole[0].steps[-1][0]
    one, other = (next((tmp_path / name).iterdir()) for name in ("checkpoints", "background"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert all((other / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


def canonical(folder: Path, model: ModelConfig) -> Canonical:
    """Every state of every tensor of a checkpoint, whole."""
    store, found = Store(folder), {}
    for name, shape in canonical_shapes(model).items():
        rows, cols = matrix(shape)
        for state in STATES:
            out = torch.empty(rows, cols, dtype=torch.float64)
            store.read(state, name, Rect(0, rows, 0, cols), out)
            found[state, name] = out
    return found


def leg(rank: int, world: int, config: Config, steps: int) -> list[tuple[float, float]]:
    """Resume if there is something, save at once what was loaded, go on, and save that too."""
    trainer, where = open_run(config)
    if resume(trainer, where, {}, lambda note: None):
        save(trainer, Checkpointer(Path(config.output_dir) / "again", trainer.mesh, config.model, 0, False))
    seen = go(trainer, steps)
    save(trainer, where)
    return seen


def same(a: Canonical, b: Canonical, tolerance: float = 0.0) -> bool:
    return all(float((a[key] - b[key]).abs().max()) <= tolerance for key in a)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_any_layout_resumes_any_layout(tmp_path: Path, model: ModelConfig) -> None:
    """tp 2 -> pp 2 -> dp 2 -> tp 4 with copied K/V heads, two steps each: the run of one process, up to rounding."""
    expected = leg(0, 1, config_of(Layout(), tmp_path / "one", "float64", model), 8)
    folder, seen = tmp_path / "many", []
    for layout in (Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=4)):
        seen += run_ranks(layout.world, leg, config_of(layout, folder, "float64", model), 2)[0]
        written = checkpoint_folders(folder / "checkpoints")
        again = checkpoint_folders(folder / "again")
        if again:
            step = again[0].name
            before = canonical(folder / "checkpoints" / step, model)
            assert same(before, canonical(again[0], model)), f"{layout} loaded and saved other bits"
    assert [p.name for p in written] == [f"step_{n:08d}" for n in (8, 6, 4)], "keep is 3"
    assert len(again) == 3
    assert torch.tensor(seen).sub(torch.tensor(expected)).abs().max() < 1e-10
    true = canonical(checkpoint_folders(tmp_path / "one" / "checkpoints")[0], model)
    assert same(canonical(written[0], model), true, 1e-10)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damaged(rank: int, world: int, config: Config) -> tuple[int, int, list[str], list[Tensor], list[Tensor]]:
    """Two checkpoints; damage in the newer one that rank 1 alone reads; then resume."""
    trainer, where = open_run(config)
    go(trainer, 1)
    save(trainer, where)
    older = states(trainer)
    go(trainer, 1)
    save(trainer, where)
    if rank == 0:
        flip_last_bit(checkpoint_folders(where.root)[0] / "rank_00001.safetensors")
    where._gather(None)
    notes: list[str] = []
    again, there = open_run(config)
    consumed = resume(again, there, {}, notes.append)
    return again.done, consumed, notes, older, states(again)


def test_all_ranks_fall_back_together(tmp_path: Path) -> None:
    results = run_ranks(2, damaged, config_of(Layout(dp=2), tmp_path))
    for done, consumed, _, older, loaded in results:
        assert (done, consumed) == (1, ROWS)
        assert all(torch.equal(a, b) for a, b in zip(older, loaded, strict=True))
    assert "rank_00001.safetensors: tensor" in results[1][2][0] and "is corrupt" in results[1][2][0]
    assert results[0][2][0] == "skipped checkpoint step_00000002: another rank could not read it"


def run_alone(folder: Path, *steps: int, keep: int = 0) -> tuple[Trainer, Checkpointer]:
    """One process that saves after each of `steps` more steps."""
    trainer, where = open_run(config_of(Layout(), folder, checkpoint=CheckpointConfig(keep=keep, async_save=False)))
    for n in steps:
        go(trainer, n)
        save(trainer, where)
    return trainer, where


def newest(folder: Path) -> tuple[int, list[str]]:
    """Step that a fresh run resumes at, and the notes."""
    trainer, where = run_alone(folder)
    notes: list[str] = []
    resume(trainer, where, {}, notes.append)
    return trainer.done, notes


def names(where: Checkpointer) -> list[str]:
    return sorted(p.name for p in where.root.iterdir())


def test_newest_is_by_step_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    _, where = run_alone(tmp_path, 1, 1)
    os.utime(where.root / "step_00000001", (2**31, 2**31))
    (where.root / "step_00000009.tmp").mkdir()
    (where.root / "step_latest").mkdir()
    (where.root / "step_00000008").write_text("a file")
    (where.root / "step_00000007").mkdir()  # a folder without a manifest
    done, notes = newest(tmp_path)
    assert done == 2
    assert len(notes) == 2 and "step_00000007: " in notes[0] and "is not a checkpoint" in notes[0]


def test_more_than_eight_digits_are_newer(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        (tmp_path / f"step_{step:08d}").mkdir()
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step_100000000", "step_99999999"]


def test_nothing_to_resume_starts_anew(tmp_path: Path) -> None:
    assert newest(tmp_path) == (0, [])


def test_no_valid_checkpoint_is_an_error(tmp_path: Path) -> None:
    """Not a silent start from nothing, which would overwrite the run."""
    _, where = run_alone(tmp_path, 1)
    flip_last_bit(where.root / "step_00000001" / "rank_00000.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint under .* is valid .*corrupt.*to start anew"):
        newest(tmp_path)


def test_another_model_is_named(tmp_path: Path) -> None:
    _, where = run_alone(tmp_path, 1)
    config = config_of(Layout(), tmp_path, model=replace(MODEL, intermediate_size=28))
    config = replace(config, checkpoint=CheckpointConfig(load=str(where.root / "step_00000001")))
    with pytest.raises(ValueError, match="another model: intermediate_size is 24 there, 28 here"):
        resume(*open_run(config), {}, print)


def test_keep_removes_the_oldest(tmp_path: Path) -> None:
    assert names(run_alone(tmp_path, 1, 1, 1, 1, keep=2)[1]) == ["step_00000003", "step_00000004"]


def test_keep_never_removes_the_newest_valid_one(tmp_path: Path) -> None:
    """After falling back, the damaged later checkpoints must not push out what is written now."""
    _, where = run_alone(tmp_path, 1, 2, 2)
    for step in (3, 5):
        flip_last_bit(where.root / f"step_{step:08d}" / "rank_00000.safetensors")
    trainer, where = run_alone(tmp_path, keep=1)
    resume(trainer, where, {}, lambda note: None)
    go(trainer, 1)
    save(trainer, where)
    assert newest(tmp_path)[0] == 2
    go(trainer, 1)
    save(trainer, where)  # step 3 again: it replaces the damaged one
    assert newest(tmp_path)[0] == 3


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_save_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    trainer, where = run_alone(tmp_path, 1)
    where.background = background

    def full(folder: Path, file: str, parts: object) -> None:
        (folder / file).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "write_rectangles", full)
        go(trainer, 1)
        with pytest.raises(OSError, match="no space left on device"):
            save(trainer, where)
            where.wait()
    assert names(where) == ["step_00000001"]
    save(trainer, where)
    where.wait()
    assert names(where) == ["step_00000001", "step_00000002"]


def test_bf16_masters_survive(tmp_path: Path) -> None:
    """Steps far below one bf16 ulp: masters rebuilt from the weights would lose them."""
    optim = OptimConfig(lr=1e-6, warmup_steps=1)
    trainer, where = open_run(config_of(Layout(), tmp_path, "bfloat16", optim=optim))
    assert trainer.optimizer is not None
    (bucket,) = trainer.optimizer.buckets[0]
    weights, masters = bucket.weights.clone(), bucket.master.clone()
    go(trainer, 2)
    save(trainer, where)
    moved = masters != bucket.master
    assert moved.sum() > 0.9 * sum(weight.numel() for weight, _ in bucket.held)
    assert (weights == bucket.weights)[moved].double().mean() > 0.9, "few weights cross a rounding boundary"
    other, there = open_run(config_of(Layout(), tmp_path, "bfloat16", optim=optim))
    resume(other, there, {}, lambda note: None)
    assert all(torch.equal(a, b) for a, b in zip(states(trainer), states(other), strict=True))
    assert go(trainer, 1) == go(other, 1)
