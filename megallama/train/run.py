"""A training run's life, the same for every stage: join the ranks, own the folder, resume, loop, save, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megallama.checkpoint import Checkpointer, Store
from megallama.checkpoint.checkpointer import Slots, checkpoint_folders
from megallama.checkpoint.formats import StoreSource, check_export, require_model, write_hf
from megallama.config import SCALAR, Config, DataConfig, dump
from megallama.files import write_whole
from megallama.runtime.faults import guard
from megallama.runtime.launch import TIMEOUT, connect, disconnect, rendezvous, resolve
from megallama.runtime.lock import sole_owner
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.runtime.metrics import Metrics
from megallama.runtime.progress import Progress
from megallama.train.loop import Loop, Task
from megallama.train.models import adopt, agreed, known_tokenizer, open_weights, scored, without_batches
from megallama.train.trainer import Trainer

PREFIXES = ("weights:", "hf:")
"""Of a checkpoint.load that names weights to start from."""


@contextmanager
def on_mesh(config: Config, where: Callable[[], str]) -> Iterator[Mesh]:
    """Join the other ranks, build the mesh, and end all ranks together if one fails."""
    world = resolve(os.environ)
    config.validate(world.size)
    store = rendezvous(world)
    with guard(world, store, where, Path(config.output_dir) / "logs"):
        device = connect(world, store)
        model, parallel = config.model, config.parallel
        yield build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, device, TIMEOUT)
    disconnect()


def run_stage(
    config: Config, prepare: Callable[[Config, Mesh], tuple[Config, Task]], build: Callable[[Config, Mesh], Trainer]
) -> int:
    """Train as `config` says; returns the exit code. Every rank of the launch calls it.

    Args:
        prepare: opens the data; returns the configuration with what only the data tells (the number of steps).
        build: makes the trainer.
    """
    trainers: list[Trainer] = []

    def where() -> str:
        trainer = trainers[0]
        step = min(trainer.done + 1, trainer.config.train.steps)
        return f"stage {' and '.join(map(str, trainer.stages))}, step {step}"

    with on_mesh(config, where) as mesh:
        config, task = prepare(config, mesh)
        with run_folder(config, mesh):
            trainers.append(build(config, mesh))
            train(trainers[0], task)
    return 0


def train(trainer: Trainer, task: Task) -> None:
    """Resume if there is something to resume from, then train to the end."""
    config, mesh = trainer.config, trainer.mesh
    folder, saves, first = Path(config.output_dir), config.checkpoint, mesh.world.rank == 0
    checkpointer = Checkpointer(folder / "checkpoints", mesh, config.model, saves.keep, saves.async_save)
    if saves.export_hf and first:
        check_export(Path(saves.export_hf), tokenizer_of(config), config.model)
    notes: list[str] = []
    consumed = resume(trainer, checkpointer, task.fingerprints, notes.append, task.stage)
    with ExitStack() as stack:
        if mesh.world.size == 1:  # after an error, the folder is another run's only when the last save has ended
            stack.callback(checkpointer.wait)
        if first:
            write_config(config)
        metrics = stack.enter_context(Metrics(folder, trainer.done)) if first else None
        progress = Progress(config.train.steps, trainer.done, config.log.interval) if first else Progress.silent()
        stack.enter_context(progress)
        for line in (*task.notes, *notes):
            progress.note(line)
        Loop(trainer, checkpointer, consumed, progress, metrics).run(task)
        last = checkpointer.folder(trainer.done)
        if saves.export_hf and first and trainer.done == config.train.steps and last.is_dir():
            write_hf(StoreSource(last), Path(saves.export_hf), torch.bfloat16, tokenizer=tokenizer_of(config))
            progress.note(f"HF export in {saves.export_hf}")


def starting_weights(load: str) -> str | None:
    """The folder in a checkpoint.load of weights:FOLDER or hf:FOLDER, else None."""
    return next((load.removeprefix(prefix) for prefix in PREFIXES if load.startswith(prefix)), None)


def of_weights(config: Config, stage: str) -> Config:
    """The configuration of a stage that starts from a model, with that model's shape, tokenizer and longest sequence
    where they are not given.

    Raises:
        ValueError: checkpoint.load names no weights while the run has no checkpoint of its own, or model.* differs.
    """
    begun = checkpoint_folders(Path(config.output_dir) / "checkpoints")
    path = config.output_dir if begun else starting_weights(config.checkpoint.load)
    if path is None:
        raise ValueError(
            f"{stage} starts from a model, but checkpoint.load={config.checkpoint.load}; set it to weights:FOLDER, "
            f"the folder of a run, a checkpoint or a Hugging Face model"
        )
    source = open_weights(path)
    config = adopt(config, source.model, source.folder)
    data = config.data
    if data.tokenizer is None and (found := known_tokenizer(source.folder)):
        data = replace(data, tokenizer=str(found))
    if data.seq_length == DataConfig().seq_length:  # not chosen: as long as the model can
        data = replace(data, seq_length=min(data.seq_length, config.model.max_position_embeddings))
    return replace(config, data=data)


def planned(config: Config, stage: str, world: int) -> Config:
    """What --dry-run describes for `world` ranks: the configuration with the shape of the weights that the stage opens.

    Raises:
        ValueError: it names none, or they differ from model.*.
    """
    if stage in ("sft", "reward", "ppo"):
        config = of_weights(config, stage)
        return replace(config, model=replace(config.model, head=SCALAR)) if stage == "reward" else config
    answers = config.generate.model or config.output_dir
    named = {"rejection-sample": config.rejection.model, "reward-eval": next(iter(config.reward.models), None)}
    path = named.get(stage, answers)
    if path is None:
        raise ValueError(f"{stage} needs weights: set {'rejection.model' if 'rejection' in stage else 'reward.models'}")
    source = open_weights(path)
    config = adopt(without_batches(config, world), source.model, source.folder)
    longest = min(config.data.seq_length, config.model.max_position_embeddings)
    return replace(config, data=replace(config.data, seq_length=longest))


def resume(
    trainer: Trainer,
    checkpointer: Checkpointer,
    fingerprints: dict[str, Any],
    note: Callable[[str], None],
    stage: str = "pretrain",
) -> int:
    """Go on from what checkpoint.load names; returns the samples consumed so far. Collective.

    A run goes on from its own newest valid checkpoint. Where it has none, auto and none start anew, weights:FOLDER and
    hf:FOLDER start from weights, and a checkpoint of another run of the same stage is continued.

    Raises:
        ValueError: none, or an older checkpoint of this very run, while the run has later ones; or a checkpoint of
            another stage.
    """
    source, optimizer = trainer.config.checkpoint.load, trainer.optimizer
    assert optimizer is not None, "a frozen model has nothing to resume"
    for line in checkpointer.sweep():
        note(line)
    weights = starting_weights(source)
    named = None if source in ("auto", "none") or weights is not None else Path(source).resolve()
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
        require_own(own[0], stage)
        store = checkpointer.load_newest(slots, note)
    elif named is not None:
        require_stage(named, stage)
        store = checkpointer.load(named, slots)
    if store is None:
        if weights is not None:
            load_weights(trainer, weights, checkpointer.meet)
            note(f"starting from the weights of {weights}")
        return 0
    manifest = store.manifest
    trainer.done, optimizer.updates = manifest["step"], manifest["updates"]
    optimizer.publish()
    note(f"resumed from {store.folder}: step {trainer.done}, {manifest['consumed_samples']} samples consumed")
    for name, value in fingerprints.items():
        if manifest["fingerprints"].get(name) != value:
            note(f"{name} has changed since that checkpoint was written")
    return manifest["consumed_samples"]


def require_own(folder: Path, stage: str) -> None:
    """A run's folder belongs to one stage.

    Raises:
        ValueError: its newest checkpoint is of another one.
    """
    try:
        theirs = Store(folder).manifest.get("stage", stage)
    except (ValueError, OSError):
        return  # damaged: an older one will be tried
    if theirs != stage:
        raise ValueError(
            f"output_dir={folder.parent.parent} holds a run of stage {theirs}, not of {stage}; set another output_dir"
        )


def require_stage(folder: Path, stage: str) -> None:
    """Steps, samples and moments go on within one stage only.

    Raises:
        ValueError: the checkpoint is of another one; says how to take its weights.
    """
    theirs = Store(folder).manifest.get("stage", stage)
    if theirs != stage:
        raise ValueError(
            f"checkpoint.load={folder} is a checkpoint of stage {theirs}, which {stage} cannot go on from; to start "
            f"from its weights set checkpoint.load to weights:{folder}"
        )


def load_weights(trainer: Trainer, path: str, meet: Callable[[], object] = lambda: None) -> None:
    """Start a trained model from weights; a scalar head that they lack is made. Collective."""
    source, model = agreed(open_weights(path), trainer.mesh), trainer.config.model
    if model.head == SCALAR:
        source = scored(source, trainer.config.train.seed)
    require_model(source, model)
    assert trainer.optimizer is not None, "a frozen model is filled, not trained"
    trainer.optimizer.load_weights(source.read, meet)


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
    write_whole(Path(config.output_dir) / "config.yaml", dump(config))


def tokenizer_of(config: Config) -> Path | None:
    return Path(config.data.tokenizer) if config.data.tokenizer else None
