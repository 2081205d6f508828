"""Small runs that save and resume, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distributed import forkserver, run_ranks
from megallama.checkpoint import Checkpointer, Store
from megallama.config import CheckpointConfig, Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import IGNORE, Batch
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import build_mesh
from megallama.train.run import resume
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
    """Sizes of the three axes, and the model chunks of a pipeline rank."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}" + (f"-vpp{self.vpp}" if self.vpp > 1 else "")

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def config_of(
    layout: Layout, folder: Path, dtype: str = "float32", model: ModelConfig = MODEL, steps: int = 10, **sections
) -> Config:
    return Config(
        model=model,
        parallel=ParallelConfig(layout.tp, layout.pp, layout.vpp, schedule="interleaved" if layout.vpp > 1 else "1f1b"),
        train=TrainConfig(steps=steps, micro_batch_size=2, global_batch_size=ROWS, dtype=dtype),
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
    """(loss, gradient norm) of the next steps, on rows of unequal length and unequal numbers of labels; each token
    follows from the one before, so that there is something to learn."""
    mesh, loss, seen = trainer.mesh, NextToken(VOCAB, trainer.mesh.tp), []
    for _ in range(steps):
        random = torch.Generator().manual_seed(trainer.done)
        rows = []
        for n in range(ROWS):
            tokens = torch.randint(VOCAB, (1,), generator=random) + 5 * torch.arange(LENGTH + 1 - n % 3)
            tokens %= VOCAB
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


def new_processes(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_ranks`, but one rank gets a process of its own as well."""
    if world > 1:
        return run_ranks(world, fn, *args)
    with ProcessPoolExecutor(1, forkserver()) as pool:
        return [pool.submit(one_process, fn, args).result(120)]


def one_process(fn: Callable[..., Any], args: tuple) -> Any:
    torch.set_num_threads(1)
    return fn(0, 1, *args)


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


def same(a: Canonical, b: Canonical, tolerance: float = 0.0) -> bool:
    return all(float((a[key] - b[key]).abs().max()) <= tolerance for key in a)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


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
