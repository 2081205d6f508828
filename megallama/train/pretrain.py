"""Pretraining: next-token prediction on tokenised corpora."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megallama.checkpoint import Checkpointer, Store
from megallama.checkpoint.formats import HFSource, StoreSource, require_model, write_hf
from megallama.config import Config, dump
from megallama.data import check_vocabulary, load_tokenizer, open_mixture
from megallama.data.loader import Loader
from megallama.runtime.faults import guard
from megallama.runtime.launch import TIMEOUT, connect, disconnect, rendezvous, resolve
from megallama.runtime.lock import sole_owner
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.runtime.metrics import Metrics
from megallama.runtime.progress import Progress
from megallama.train.loop import Loop, Task
from megallama.train.trainer import NextToken, Trainer, build_trainer

HF = "hf:"


@contextmanager
def on_mesh(config: Config, where: Callable[[], str]) -> Iterator[Mesh]:
    """Join the other ranks, build the mesh, and end all ranks together if one fails."""
    world = resolve(os.environ)
    config.validate(world.size)
    store = rendezvous(world)
    with guard(world, store, where, Path(config.output_dir) / "logs"):
        device = connect(world, store)
        model, parallel = config.model, config.parallel
        tied = model.tie_word_embeddings
        yield build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, tied, device, TIMEOUT)
    disconnect()


def run(config: Config) -> int:
    """Train as `config` says; returns the exit code. Every rank of the launch calls it."""
    trainers: list[Trainer] = []

    def where() -> str:
        trainer = trainers[0]
        return f"stage {' and '.join(map(str, trainer.stages))}, step {trainer.done + 1}"

    with on_mesh(config, where) as mesh:
        task = pretraining_task(config, mesh)
        with run_folder(config, mesh):
            trainers.append(build_trainer(config, mesh))
            pretrain(trainers[0], task)
    return 0


def pretrain(trainer: Trainer, task: Task) -> None:
    """Resume if there is something to resume from, then train to the end."""
    config, first = trainer.config, trainer.mesh.world.rank == 0
    folder, keep = Path(config.output_dir), config.checkpoint
    checkpointer = Checkpointer(folder / "checkpoints", trainer.mesh, config.model, keep.keep, keep.async_save)
    notes: list[str] = []
    consumed = resume(trainer, checkpointer, task.fingerprints, notes.append)
    with ExitStack() as stack:
        metrics = stack.enter_context(Metrics(folder, trainer.done)) if first else None
        progress = Progress(config.train.steps, trainer.done, config.log.interval) if first else Progress.silent()
        stack.enter_context(progress)
        for line in notes:
            progress.note(line)
        Loop(trainer, checkpointer, consumed, progress, metrics).run(task)
        if keep.export_hf and first and trainer.done == config.train.steps:
            last, folder = StoreSource(checkpointer.folder(trainer.done)), Path(keep.export_hf)
            tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
            write_hf(last, folder, torch.bfloat16, tokenizer=tokenizer)
            progress.note(f"HF export in {folder}")


def resume(
    trainer: Trainer, checkpointer: Checkpointer, fingerprints: dict[str, Any], note: Callable[[str], None]
) -> int:
    """Go on from what checkpoint.load names; returns the samples consumed so far. Collective.

    A run goes on from its own newest valid checkpoint. Where it has none, auto and none start anew, hf:FOLDER starts
    from an HF Llama's weights, and another run's checkpoint folder is continued.

    Raises:
        ValueError: none, or an older checkpoint of this very run, while the run has later ones.
    """
    source, optimizer = trainer.config.checkpoint.load, trainer.optimizer
    assert optimizer is not None, "pretraining trains"
    for line in checkpointer.sweep():
        note(line)
    own, folder = checkpointer.folders(), Path(source)
    back = folder.parent.resolve() == checkpointer.root.resolve()
    if own and (source == "none" or (back and folder.name != own[0].name)):
        raise ValueError(
            f"checkpoint.load={source}, but {checkpointer.root} goes on to {own[0].name}, which a restart would go on "
            f"from; remove the later checkpoints, or set another output_dir"
        )
    if own or source == "auto":
        store = checkpointer.load_newest(optimizer.slots, note)
    elif source == "none" or source.startswith(HF):
        store = None
    else:
        store = checkpointer.load(folder, optimizer.slots if "exp_avg" in Store(folder).states else optimizer.weights)
    if store is None:
        if source.startswith(HF):
            weights = HFSource(Path(source.removeprefix(HF)))
            require_model(weights, trainer.config.model)
            optimizer.load_weights(weights.read)
            note(f"starting from the weights of {weights.folder}")
        return 0
    manifest = store.manifest
    trainer.done, optimizer.updates = manifest["step"], manifest["updates"]
    optimizer.publish()
    note(f"resumed from {store.folder}: step {trainer.done}, {manifest['consumed_samples']} samples consumed")
    for name, value in fingerprints.items():
        if manifest["fingerprints"].get(name) != value:
            note(f"{name} has changed since that checkpoint was written")
    return manifest["consumed_samples"]


def pretraining_task(config: Config, mesh: Mesh) -> Task:
    """Open the corpora; every rank opens them itself, which takes milliseconds.

    Raises:
        ValueError: no sources, a damaged or too short one, or a tokenizer that does not fit the model.
    """
    data, model = config.data, config.model
    if not data.sources:
        raise ValueError(
            "data.sources is empty: name at least one {prefix: …, weight: …} made by tools/preprocess_data.py"
        )
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    check_vocabulary([source.prefix for source in data.sources], model.vocab_size, tokenizer)
    fingerprints = {"tokenizer": tokenizer.fingerprint()} if tokenizer else {}

    def loader(part: str) -> Loader:
        sources = [(source.prefix, source.weight) for source in data.sources]
        mixture = open_mixture(sources, data.seq_length, data.split, part, config.train.seed)
        return Loader(mixture, data.mask_documents, mesh.tp.size, model.vocab_size)

    train = loader("train")
    fingerprints |= {f"data {corpus.dataset.prefix}": corpus.dataset.fingerprint() for corpus in train.mixture.corpora}
    validates = data.split > 0 and config.train.valid_interval > 0
    return Task(NextToken(model.vocab_size, mesh.tp), train, loader("valid") if validates else None, fingerprints)


@contextmanager
def run_folder(config: Config, mesh: Mesh) -> Iterator[None]:
    """Make the run's folder, own it, and write its resolved configuration. Collective.

    Raises:
        ValueError: the folder cannot be written, or another run owns it.
    """
    folder = Path(config.output_dir)
    with ExitStack() as stack:
        if mesh.world.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(sole_owner(folder))
                (folder / "config.yaml").write_text(dump(config))
            except OSError as error:
                raise ValueError(
                    f"output_dir={folder} cannot be written ({error.strerror}); set output_dir to a folder of yours"
                ) from error
        if mesh.world.size > 1:
            dist.barrier(mesh.world.group)
        yield
