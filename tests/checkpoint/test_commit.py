"""The commit protocol: what is half-written never counts, and what is committed is never lost."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import MODEL, Layout, config_of, flip_last_bit, go, names, newest, open_run, run_alone, save
from torch import Tensor

from distributed import forkserver, run_ranks
from megallama.checkpoint import Checkpointer, checkpoint_folders, checkpointer
from megallama.config import CheckpointConfig, Config
from megallama.train.run import resume
from megallama.train.trainer import Trainer

TINY = replace(MODEL, num_hidden_layers=1)
LARGE = replace(MODEL, hidden_size=256, intermediate_size=704)
"""16 MiB of state: a save takes long enough to be killed in it."""


def test_newest_is_by_step_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    _, where = run_alone(tmp_path, 1, 1)
    os.utime(where.root / "step_00000001", (2**31, 2**31))
    (where.root / "step_00000009.tmp").mkdir()
    (where.root / "step_latest").mkdir()
    (where.root / "step_00000008").write_text("a file")
    (where.root / "step_00000007").mkdir()  # a folder without a manifest
    done, notes = newest(tmp_path)
    assert done == 2
    assert notes[0] == "skipped checkpoint step_00000009: its save was cut off; step_00000009.tmp is removed"
    assert len(notes) == 3 and "step_00000007: " in notes[1] and "is not a checkpoint" in notes[1]
    assert not list(where.root.glob("*.tmp"))


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
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, background: bool, foreseen: bool
) -> None:
    """Where free space can be asked for, nothing is written; else what was written is removed. Then room is made."""
    trainer, where = run_alone(small_disk, 1)
    where.background = background
    go(trainer, 1)
    size = sum(path.stat().st_size for path in (where.root / "step_00000001").iterdir())
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size // 2))
    with monkeypatch.context() as patch:
        if foreseen:
            patch.setattr(checkpointer, "write_rectangles", None)
        else:
            plenty = shutil.disk_usage(small_disk)._replace(free=2**40)
            patch.setattr(shutil, "disk_usage", lambda path: plenty)
        save(trainer, where)
        where.wait()
    (step, why), *others = where.failed().items()
    expected = r"has 0\.\d MiB free, a checkpoint needs 0\.\d MiB" if foreseen else "rank 0: .*No space left"
    assert step == 2 and re.search(expected, why) and not others
    assert not where.failed(), "told once"
    assert names(where) == ["step_00000001"]
    filler.unlink()
    save(trainer, where)
    where.wait()
    assert not where.failed() and newest(small_disk)[0] == 2


def test_checkpoints_that_are_too_many_make_room(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is started again with a smaller keep, on a full disk; the newest valid one stays, a damaged one that
    counts as newer does not protect itself."""
    _, where = run_alone(small_disk, 1, 1, 1)
    size = sum(path.stat().st_size for path in (where.root / "step_00000001").iterdir())
    flip_last_bit(where.root / "step_00000003" / "rank_00000.safetensors")
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - size // 2))
    trainer, where = run_alone(small_disk, keep=1)
    resume(trainer, where, {}, lambda note: None)
    assert trainer.done == 2
    go(trainer, 2)
    monkeypatch.setattr(checkpointer, "write_rectangles", refuse)
    save(trainer, where)
    where.wait()
    assert list(where.failed()) == [4] and names(where) == ["step_00000002", "step_00000003"], "room was made"
    monkeypatch.undo()
    save(trainer, where)
    where.wait()
    assert not where.failed() and names(where) == ["step_00000004"]


def one_rank_cannot_write(rank: int, world: int, config: Config) -> tuple[list[str], dict[int, str], int]:
    trainer, where = open_run(config)
    go(trainer, 1)
    save(trainer, where)
    good = checkpointer.write_rectangles
    if rank == 1:
        checkpointer.write_rectangles = refuse
    go(trainer, 1)
    save(trainer, where)
    checkpointer.write_rectangles = good
    after = go(trainer, 1)
    where._gather(None)
    return names(where), where.failed(), len(after)


def refuse(*_: object) -> None:
    raise OSError("Input/output error")


def test_one_rank_that_cannot_write_stops_nobody(tmp_path: Path) -> None:
    first, second = run_ranks(2, one_rank_cannot_write, config_of(Layout(dp=2), tmp_path))
    assert first == (["step_00000001"], {2: "rank 1: Input/output error"}, 1)
    assert second[1:] == ({}, 1)


def no_folder(rank: int, world: int, config: Config) -> dict[int, str]:
    trainer, where = open_run(config)
    save(trainer, where)
    return where.failed()


def test_a_folder_that_cannot_be_made_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    first, second = run_ranks(2, no_folder, config_of(Layout(dp=2), tmp_path))
    assert "Not a directory" in first[0] and not second


def test_a_background_save_is_of_the_moment_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk hangs, steps go on and change what the checkpoint must not show; a second save waits its turn."""
    trainer, where = run_alone(tmp_path)
    where.background, disk, write = True, threading.Event(), checkpointer.write_rectangles

    def hanging(*args: Any) -> Any:
        assert disk.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpointer, "write_rectangles", hanging)
    mark_and_save(trainer, where)
    assert not where.folder(1).exists()
    for values in everything(trainer):
        values.fill_(7)
    threading.Timer(0.3, disk.set).start()
    mark_and_save(trainer, where)
    assert disk.is_set() and "step_00000001" in names(where)
    where.wait()
    assert names(where) == ["step_00000001", "step_00000002"]
    for step in (1, 2):
        where.load(where.folder(step), lambda store: trainer.optimizer.slots())
        assert all(bool((values == step).all()) for values in everything(trainer))


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a killed process, unlike a power cut, loses nothing of what it has handed
    to the kernel, so the disk would only slow these tests down."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)


CALLS = ("open", "mkdir", "pwrite", "fsync", "rename", "unlink", "rmdir")


def die_at(call: int, config: Config) -> None:
    """Two saves, only the newest kept; killed at the given call of the second to the file system. The last bytes are
    then half written."""
    torch.set_num_threads(1)
    trainer, where = open_run(config)
    mark_and_save(trainer, where)
    seen = itertools.count()
    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name), seen, call))
    mark_and_save(trainer, where)


def deadly(function: Callable, seen: Iterator[int], last: int) -> Callable:
    def call(*args: Any, **options: Any) -> Any:
        if next(seen) == last:
            if function.__name__ == "pwrite":
                function(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call


def mark_and_save(trainer: Trainer, where: Checkpointer) -> None:
    """Instead of a step, every state of every element becomes the step's number."""
    trainer.done += 1
    for slot in everything(trainer):
        slot.fill_(trainer.done)
    save(trainer, where)


def everything(trainer: Trainer) -> list[Tensor]:
    assert trainer.optimizer is not None
    return [values for _, states in trainer.optimizer.slots() for values in states.values()]


def resume_marked(trainer: Trainer, where: Checkpointer) -> list[str]:
    """Resume, and see that nothing of another step is there; the notes."""
    notes: list[str] = []
    resume(trainer, where, {}, notes.append)
    assert trainer.done == 0 or all(bool((values == trainer.done).all()) for values in everything(trainer))
    return notes


@pytest.mark.slow
def test_killed_at_every_step_of_the_protocol(in_memory: Path) -> None:
    """One process for each call that a save makes to the file system. Whatever was last, a checkpoint is there, and
    once the second has been renamed, it is that one."""
    found, keep = [], CheckpointConfig(keep=1, async_save=False)
    for call in itertools.count():
        config = config_of(Layout(), in_memory / str(call), model=TINY, checkpoint=keep)
        process = forkserver().Process(target=die_at, args=(call, config))
        process.start()
        process.join(60)
        root = Path(config.output_dir) / "checkpoints"
        half = sorted(path.name for path in root.glob("*.tmp") if not path.name.endswith(".old.tmp"))
        trainer, where = open_run(config)
        notes = resume_marked(trainer, where)
        assert [line.split(";")[0] for line in notes[:-1]] == [
            f"skipped checkpoint {name.removesuffix('.tmp')}: its save was cut off" for name in half
        ]
        assert not list(root.glob("*.tmp"))
        found.append(trainer.done)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert found == sorted(found) and set(found) == {1, 2} and found.count(1) > 20 and found.count(2) > 5, found


def live(rank: int, world: int, config: Config, rendezvous: str, told: connection.Connection) -> None:
    """Resume, then save without end, until killed; rank 0 tells what is certainly saved."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    trainer, where = open_run(config)
    notes = resume_marked(trainer, where)
    tell = told.send if rank == 0 else lambda what: None
    tell((trainer.done, notes))
    while True:
        mark_and_save(trainer, where)
        tell((trainer.done - where.background, []))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "lives"), [(Layout(), 20), (Layout(dp=2), 8)], ids=["alone", "two ranks"])
def test_killed_at_twenty_random_moments(in_memory: Path, layout: Layout, lives: int) -> None:
    """One run of many lives: none starts before what the last one had saved, and a save that was cut off is told."""
    random, last, cut_off = Random(7), 0, 0
    context = forkserver()
    for life in range(lives):
        told, tells = context.Pipe(duplex=False)
        keep = CheckpointConfig(keep=2, async_save=life % 2 == 1)
        config = config_of(layout, in_memory, model=LARGE, checkpoint=keep)
        args = (layout.world, config, str(in_memory / f"rendezvous_{life}"), tells)
        ranks = [context.Process(target=live, args=(rank, *args)) for rank in range(layout.world)]
        for process in ranks:
            process.start()
        tells.close()
        began, notes = told.recv()
        assert began >= last, f"life {life} began at step {began}, but step {last} had been saved"
        last = told.recv()[0]
        time.sleep(random.random() / 5)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        while True:
            try:
                last = told.recv()[0]
            except EOFError:
                break
        cut_off += any("its save was cut off" in line for line in notes)
        assert len(checkpoint_folders(in_memory / "checkpoints")) <= 3
    assert last >= lives // 2 and cut_off > lives // 3, (last, cut_off)
