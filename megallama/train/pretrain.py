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
from megallama.checkpoint.checkpointer import Slots
from megallama.checkpoint.formats import HFSource, StoreSource, check_export, require_model, write_hf
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
        step = min(trainer.done + 1, config.train.steps)
        return f"stage {' and '.join(map(str, trainer.stages))}, step {step}"

    with on_mesh(config, where) as mesh:
        task = pretraining_task(config, mesh)
        with run_folder(config, mesh):
            trainers.append(build_trainer(config, mesh))
            pretrain(trainers[0], task)
    return 0


def pretrain(trainer: Trainer, task: Task) -> None:
    """Resume if there is something to resume from, then train to the end."""
    config, mesh = trainer.config, trainer.mesh
    folder, saves, first = Path(config.output_dir), config.checkpoint, mesh.world.rank == 0
    checkpointer = Checkpointer(folder / "checkpoints", mesh, config.model, saves.keep, saves.async_save)
    if saves.export_hf and first:
        check_export(Path(saves.export_hf), tokenizer_of(config), config.model)
    notes: list[str] = []
    consumed = resume(trainer, checkpointer, task.fingerprints, notes.append)
    with ExitStack() as stack:
        if mesh.world.size == 1:  # after an error, the folder is another run's only when the last save has ended
            stack.callback(checkpointer.wait)
        if first:
            write_config(config)
        metrics = stack.enter_context(Metrics(folder, trainer.done)) if first else None
        progress = Progress(config.train.steps, trainer.done, config.log.interval) if first else Progress.silent()
        stack.enter_context(progress)
        for line in notes:
            progress.note(line)
        Loop(trainer, checkpointer, consumed, progress, metrics).run(task)
        last = checkpointer.folder(trainer.done)
        if saves.export_hf and first and trainer.done == config.train.steps and last.is_dir():
            write_hf(StoreSource(last), Path(saves.export_hf), torch.bfloat16, tokenizer=tokenizer_of(config))
            progress.note(f"HF export in {saves.export_hf}")


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
    named = None if source in ("auto", "none") or source.startswith(HF) else Path(source).resolve()
    own, root = checkpointer.folders(), checkpointer.root.resolve()
    goes_back = named is not None and named.parent == root and own and named.name != own[0].name
    if own and (source == "none" or goes_back):
        raise ValueError(
            f"checkpoint.load={source}, but {checkpointer.root} goes on to {own[0].name}, which a restart would go on "
            f"from; remove the later checkpoints, or set another output_dir"
        )

    def slots(store: Store) -> Slots:
        """All states, or what a conversion has written: weights alone, with which a run starts."""
        return optimizer.slots() if "exp_avg" in store.states else optimizer.weights()

    store = None
    if own:
        store = checkpointer.load_newest(slots, note)
    elif named is not None:
        store = checkpointer.load(named, slots)
    if store is None:
        if source.startswith(HF):
            weights = HFSource(Path(source.removeprefix(HF)))
            require_model(weights, trainer.config.model)
            optimizer.load_weights(weights.read, checkpointer.meet)
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
    """Make the run's folder and own it. After an error in a world of several, whose other ranks may still be writing,
    it is let go only by the process's end. Collective.

    Raises:
        ValueError: the folder cannot be written, or another run owns it.
    """
    folder, owned = Path(config.output_dir), ExitStack()
    if mesh.world.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            owned.enter_context(sole_owner(folder))
        except OSError as error:
            raise ValueError(
                f"output_dir={folder} cannot be written ({error.strerror}); set output_dir to a folder of yours"
            ) from error
    if mesh.world.size > 1:
        dist.barrier(mesh.world.group)
        yield
        owned.close()
    else:
        with owned:
            yield


def write_config(config: Config) -> None:
    """The resolved configuration, into the run's folder: only once nothing of it has been refused."""
    path = Path(config.output_dir) / "config.yaml"
    path.with_suffix(".tmp").write_text(dump(config))
    path.with_suffix(".tmp").replace(path)


def tokenizer_of(config: Config) -> Path | None:
    return Path(config.data.tokenizer) if config.data.tokenizer else None
