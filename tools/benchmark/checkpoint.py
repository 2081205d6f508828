"""Seconds of saving and loading a checkpoint, beside the disk itself and torch.distributed.checkpoint, all in one run.

    python tools/benchmark/checkpoint.py                            # a state of 1 GB, on the working directory's disk
    python tools/benchmark/checkpoint.py --folder /scratch --gigabytes 4 --rounds 9 --json checkpoint.json

The state is a Llama's fp32 masters and two moments, in one process, on CPUs. All contestants move the same bytes to or
from the same folder and take turns, round by round, so that a machine that slows down slows all of them. Before a save
the files of the last one are removed and the disk is idle (sync). "of raw" is the speed as a part of raw's: the median
of the parts in each round.

raw             one file, written and read in blocks of 4 MiB, with fsync
raw, reserved   the same into reserved space, flushed while it is written: as fast as files on this disk get
dcp             torch.distributed.checkpoint, whole tensors. Its writer syncs its files (not their folder), so no sync
                is added; its reader does not verify them. The fastest of its rows is the one to compare with.
memcpy          copying the same bytes into memory that is in use: the bound of a save in the background
first save      of a run: memory for the copy is new
until staged    dcp copies in a thread too; its call alone is quick, but until the copy is there nothing may change

"load, cold" reads files whose pages have left memory; how much then came from the disk is printed.
Needs Linux, about eight times the state's size of memory and four times of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions

from megallama.checkpoint import Checkpointer
from megallama.checkpoint.tensors import sync
from megallama.config import Config, ModelConfig, TrainConfig
from megallama.model.canonical import canonical_shapes
from megallama.optim import Zero1
from megallama.runtime.mesh import Mesh
from megallama.train.trainer import build_stages

BLOCK = 4 << 20
"""Bytes of a raw write or read."""

FLUSH = 16
"""Blocks of a reserved file after which the disk is told to go on."""

MEMORY, DISK = 8, 4
"""Times the state's size that a run takes."""

LEAST = 0.001
"""Gigabytes; the smallest model here is hardly smaller."""

COLD = 0.9
"""Part of the bytes that must come from the disk in a cold load."""

BARE = ModelConfig(num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, vocab_size=1)
UNPINNED = StagingOptions(False, False, False, False)
"""dcp's staging without what needs a GPU."""


class Entrant(NamedTuple):
    """One contestant. With a "bound" the others are compared, and with the fastest "peer". Only `act` is timed."""

    name: str
    role: str
    act: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


def model_of(gigabytes: float) -> ModelConfig:
    """A Llama whose state has that size: half of it in eight blocks, the rest in the vocabulary, which fits exactly."""
    parameters = gigabytes * 1e9 / 12
    width = max(1, int(math.sqrt(parameters / 2 / (8 * 11.25)) / 16)) * 16
    bare = replace(BARE, hidden_size=width, intermediate_size=width * 11 // 4)
    left = parameters - sum(math.prod(shape) for shape in canonical_shapes(bare).values())
    return replace(bare, vocab_size=1 + max(0, round(left / (2 * width))))


class State:
    """The same bytes three times: megallama's, dcp's, and in one piece for raw files and plain copies.

    Attributes:
        optimizer: megallama's; its slots are what a run saves.
        ours: the tensors of the slots.
        theirs: dcp's, in the same order; whole, in memory of their own (dcp would copy views first).
        named: dcp's, as the state dict that it is given.
        flat: all bytes, in the same order.
    """

    def __init__(self, gigabytes: float):
        self.model, self.mesh = model_of(gigabytes), Mesh()
        config = Config(model=self.model, train=TrainConfig(dtype="float32"))
        self.optimizer = Zero1(build_stages(config, self.mesh), self.mesh, config.optim)
        self.ours: list[Tensor] = []
        self.theirs: list[Tensor] = []
        self.named: dict[str, dict[str, Any]] = {"model": {}, "optim": {}}
        shapes = canonical_shapes(self.model)
        torch.manual_seed(1)
        for slot, states in self.optimizer.slots():
            own = {state: values.normal_().clone().view(shapes[slot.name]) for state, values in states.items()}
            self.ours += states.values()
            self.theirs += own.values()
            self.named["model"][slot.name] = own.pop("weight")
            self.named["optim"][slot.name] = own
        self.flat = torch.cat([values.view(-1) for values in self.ours]).view(torch.uint8)
        self._parts = self.flat.view(torch.float32).split([values.numel() for values in self.ours])

    def copy(self) -> None:
        """`ours` into `flat`, which holds just that."""
        for part, values in zip(self._parts, self.ours, strict=True):
            part.copy_(values.view(-1))

    def require_loaded(self, who: str, load: Callable[[], object], into: list[Tensor]) -> None:
        """See that `load` brings `into` back bit by bit.

        Raises:
            ValueError: it does not.
        """
        for values in into:
            values.zero_()
        load()
        wrong = sum(not torch.equal(part, values.view(-1)) for part, values in zip(self._parts, into, strict=True))
        if wrong:
            raise ValueError(f"{who} loaded {wrong} of {len(into)} tensors otherwise than they were saved")


class Raw:
    """One file of plain bytes."""

    def __init__(self, folder: Path, data: memoryview):
        self.path, self._size = folder / "data", len(data)
        self._blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]

    def write(self, reserve: bool = False) -> None:
        self.path.parent.mkdir()
        with open(self.path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as flusher:
            if reserve:
                os.posix_fallocate(file.fileno(), 0, self._size)
            for number, block in enumerate(self._blocks):
                transfer(file.write, block)
                if reserve and number % FLUSH == FLUSH - 1:
                    flusher.submit(os.fsync, file.fileno())
            os.fsync(file.fileno())

    def read(self) -> None:
        """Back into the bytes themselves."""
        with open(self.path, "rb", buffering=0) as file:
            for block in self._blocks:
                transfer(file.readinto, block)


def transfer(move: Callable[[memoryview], int], block: memoryview) -> None:
    while block:
        count = move(block)
        assert count, "a file that was written whole ends early"
        block = block[count:]


class Ours:
    """megallama's checkpointer, as a run uses it."""

    def __init__(self, root: Path, state: State):
        self.root, self.state = root, state
        self.at_once, self.background = self.new(False), self.new(True)

    def new(self, background: bool) -> Checkpointer:
        return Checkpointer(self.root, self.state.mesh, self.state.model, background=background)

    def save(self, background: bool = False) -> None:
        """In the background, returns when the state is copied."""
        by = self.background if background else self.at_once
        by.save(1, self.state.optimizer.slots(), {"consumed_samples": 0, "updates": 0, "fingerprints": {}})

    def finish(self) -> None:
        """Wait for a save in the background.

        Raises:
            OSError: a save has failed.
        """
        self.background.wait()
        for why in [*self.at_once.failed().values(), *self.background.failed().values()]:
            raise OSError(why)

    def load(self) -> None:
        self.at_once.load(self.at_once.folder(1), lambda store: self.state.optimizer.slots())


class Theirs:
    """torch.distributed.checkpoint in one process."""

    def __init__(self, folder: Path, state: State):
        self.folder, self.state = folder, state
        self.kept, self.threaded = DefaultStager(UNPINNED), DefaultStager(replace(UNPINNED, use_async_staging=True))
        self._pending: Future[Any] | None = None

    def save(self, threads: int) -> None:
        writer = dcp.FileSystemWriter(self.folder, thread_count=threads)
        dcp.save(self.state.named, storage_writer=writer, no_dist=True)

    def save_background(self, stager: AsyncStager | None, until_staged: bool = False) -> None:
        """Returns when `stager` does; None is a new one for each save, as dcp makes it."""
        result = dcp.async_save(self.state.named, checkpoint_id=self.folder, async_stager=stager, no_dist=True)
        if isinstance(result, Future):
            self._pending = result
        else:
            self._pending = result.upload_completion
            if until_staged:
                result.staging_completion.result()

    def finish(self) -> None:
        """Wait for a save in the background."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> None:
        dcp.load(self.state.named, checkpoint_id=self.folder, no_dist=True)


class Contests:
    """Who takes part in what. Each contestant has a folder below `root`."""

    def __init__(self, root: Path, state: State):
        self.state = state
        self.folders = {"raw": root / "raw", "megallama": root / "megallama", "dcp": root / "dcp"}
        self.raw = Raw(self.folders["raw"], state.flat.numpy().data)
        self.ours = Ours(self.folders["megallama"], state)
        self.theirs = Theirs(self.folders["dcp"], state)
        self.from_disk: dict[str, float] = {}

    def clear(self) -> None:
        """No files, and an idle disk."""
        for folder in self.folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()

    def save(self) -> list[Entrant]:
        return [
            Entrant("raw", "bound", self.raw.write, self.clear),
            Entrant("raw, reserved", "bound", partial(self.raw.write, reserve=True), self.clear),
            Entrant("megallama", "", self.ours.save, self.clear, self.ours.finish),
            Entrant("dcp", "peer", partial(self.theirs.save, 1), self.clear),
            Entrant("dcp, 2 threads", "peer", partial(self.theirs.save, 2), self.clear),
        ]

    def prepare_loads(self) -> None:
        """Write what is to be loaded, and see that it comes back."""
        self.clear()
        self.raw.write()
        self.ours.save()
        self.ours.finish()
        self.theirs.save(1)
        self.state.require_loaded("megallama", self.ours.load, self.state.ours)
        self.state.require_loaded("dcp", self.theirs.load, self.state.theirs)

    def load_warm(self) -> list[Entrant]:
        return [
            Entrant("raw", "bound", self.raw.read),
            Entrant("megallama", "", self.ours.load),
            Entrant("dcp", "peer", self.theirs.load),
        ]

    def load_cold(self) -> list[Entrant]:
        """The same; `from_disk` gets the smallest part of the bytes that came from the disk in a round."""
        start = 0

        def before(name: str) -> None:
            nonlocal start
            drop_pages(self.folders[name])
            start = bytes_read()

        def after(name: str) -> None:
            part = (bytes_read() - start) / self.state.flat.nbytes
            self.from_disk[name] = min(part, self.from_disk.get(name, part))

        return [e._replace(before=partial(before, e.name), after=partial(after, e.name)) for e in self.load_warm()]

    def blocked(self) -> list[Entrant]:
        """How long a step loop stands still."""
        ours, theirs, clear = self.ours, self.theirs, self.clear

        def begin_anew() -> None:
            ours.background = ours.new(True)
            clear()

        async_ours, async_dcp = partial(ours.save, background=True), theirs.save_background
        staged, call = partial(async_dcp, theirs.threaded, until_staged=True), partial(async_dcp, theirs.threaded)
        return [
            Entrant("memcpy", "bound", self.state.copy),
            Entrant("megallama", "", ours.save, clear, ours.finish),
            Entrant("megallama async, first save", "", async_ours, begin_anew, ours.finish),
            Entrant("megallama async", "", async_ours, clear, ours.finish),
            Entrant("dcp", "peer", partial(theirs.save, 1), clear),
            Entrant("dcp async", "peer", partial(async_dcp, None), clear, theirs.finish),
            Entrant("dcp async, stager kept", "peer", partial(async_dcp, theirs.kept), clear, theirs.finish),
            Entrant("dcp async, until staged", "peer", staged, clear, theirs.finish),
            Entrant("  its call alone", "", call, clear, theirs.finish),
        ]


def drop_pages(folder: Path) -> None:
    """Let the files below `folder` be read from the disk the next time."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """What this process has had from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def race(entrants: list[Entrant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each entrant; they take turns, and the first turn does not count."""
    seconds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for turn in range(1 + rounds):
        for entrant in entrants:
            entrant.before()
            start = time.perf_counter()
            entrant.act()
            taken = time.perf_counter() - start
            entrant.after()
            if turn:
                seconds[entrant.name].append(taken)
    return seconds


def judge(entrants: list[Entrant], seconds: dict[str, list[float]], nbytes: int) -> dict[str, Any]:
    """Medians, and speeds as parts of the bounds' and of the fastest peer's."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((e.name for e in entrants if e.role == "peer"), key=medians.__getitem__)
    references = [e.name for e in entrants if e.role == "bound"] + [best]

    def ratio(reference: str, name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[reference], seconds[name], strict=True))

    return {
        name: {
            "rounds": seconds[name],
            "seconds": median,
            "gigabytes_per_second": nbytes / median / 1e9,
            "of": {reference: ratio(reference, name) for reference in references},
        }
        for name, median in medians.items()
    }


def table(title: str, results: dict[str, Any]) -> None:
    references = list(next(iter(results.values()))["of"])
    print(f"\n{title:30}{'s':>8}{'GB/s':>8}", *(f"  of {name}" for name in references), sep="")
    for name, result in results.items():
        ratios = (f"{result['of'][reference]:{len(reference) + 5}.3f}" for reference in references)
        print(f"{name:30}{result['seconds']:8.3f}{result['gigabytes_per_second']:8.2f}", *ratios, sep="", flush=True)


def run(state: State, root: Path, rounds: int) -> dict[str, Any]:
    """All contests, one after the other."""
    contests, results = Contests(root, state), {}

    def hold(title: str, entrants: list[Entrant]) -> None:
        results[title] = judge(entrants, race(entrants, rounds), state.flat.nbytes)
        table(title, results[title])

    try:
        hold("save", contests.save())
        contests.prepare_loads()
        print("\nboth have loaded what was saved, bit by bit")
        hold("load, warm", contests.load_warm())
        hold("load, cold", contests.load_cold())
        parts = ", ".join(f"{name} {part:.0%}" for name, part in contests.from_disk.items())
        warm = min(contests.from_disk.values()) < COLD
        print(f"{'NOT COLD: ' if warm else ''}from the disk in each round, at least: {parts}")
        hold("blocked", contests.blocked())
    finally:
        contests.ours.background.wait()
        contests.theirs.finish()
    return {"contests": results, "from_disk": contests.from_disk}


def machine(folder: Path) -> dict[str, Any]:
    """Where it is measured."""
    disk = subprocess.run(["df", "--output=fstype,source", folder], capture_output=True, text=True, check=True).stdout
    return {
        "name": platform.node(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "disk": " on ".join(disk.splitlines()[-1].split()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def require_sense(gigabytes: float, rounds: int, folder: Path, json_file: Path) -> None:
    """
    Raises:
        ValueError: the options make no sense on this machine.
    """
    if not Path("/proc/self/io").exists():
        raise ValueError("this benchmark needs Linux, whose /proc/self/io tells what came from the disk")
    if not LEAST <= gigabytes < math.inf or rounds < 1:
        raise ValueError(f"--gigabytes {gigabytes} must be at least {LEAST}, and --rounds {rounds} at least 1")
    for place in (folder, json_file.parent):
        if not place.is_dir():
            raise ValueError(f"there is no folder {place}; make it first")
    memory, disk = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), shutil.disk_usage(folder).free
    for times, there, what in ((MEMORY, memory / 1e9, "of memory"), (DISK, disk / 1e9, f"free in {folder}")):
        if gigabytes * times > there:
            raise ValueError(
                f"--gigabytes {gigabytes:g} takes {gigabytes * times:.1f} GB {what}, but there are {there:.1f} GB; "
                f"choose at most {there / times:.3g}"
            )


def measure(gigabytes: float, rounds: int, folder: Path, json_file: Path | None) -> None:
    """Print, and write to `json_file`, what `run` finds."""
    require_sense(gigabytes, rounds, folder, json_file or folder / "none")
    about, state = machine(folder), State(gigabytes)
    about |= {"bytes": state.flat.nbytes, "tensors": len(state.ours), "rounds": rounds}
    print(
        f"{about['name']}: {about['cpus']} CPUs (load {about['load']:.1f}), {about['disk']}, torch {about['torch']}, "
        f"{about['threads']} threads\n{about['bytes'] / 1e9:.3f} GB in {about['tensors']} tensors, {rounds} rounds"
    )
    with tempfile.TemporaryDirectory(prefix="checkpoint_benchmark_", dir=folder) as root:
        results = run(state, Path(root), rounds)
    if json_file:
        work = json_file.with_name(json_file.name + ".tmp")
        work.write_text(json.dumps({**about, **results}, indent=1))
        sync(work)
        work.rename(json_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (1.0)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each contestant (5)")
    parser.add_argument("--folder", type=Path, default=Path(), help="disk to measure (the working directory's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # through the cleaning up
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
    try:
        measure(args.gigabytes, args.rounds, args.folder.resolve(), args.json)
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
