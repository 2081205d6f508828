"""Saving and loading a run's checkpoints: commit by rename, newest valid one first, in the background if wanted."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.checkpoint.store import FileRecord, Store, Stored, write_manifest, write_rectangles
from megallama.checkpoint.tensors import sync
from megallama.config import LM, ModelConfig
from megallama.model.canonical import TRAINING_ONLY, canonical_shapes
from megallama.parallel.pieces import Piece, Slot
from megallama.runtime.mesh import Mesh

Slots = Iterable[tuple[Slot | Piece, Mapping[str, Tensor]]]
"""Canonical rectangles of a rank, each with its states as (height, width) views."""

UNFINISHED = ".tmp"
"""Ends the name of a checkpoint that is being written."""

LEAVING = ".old" + UNFINISHED
"""Ends the name of one that is being removed."""

ALIGN = 64
"""Bytes to which tensors are aligned in the host copy."""

BESIDE = "beside"
"""Key of a manifest: models beside the main one, by name."""

SINCE = {"head": LM}
"""Keys of a model that older manifests do not have, with what they then mean."""

SLOWEST = timedelta(hours=2)
"""That ranks wait for each other's disks. Dead ranks end the run much earlier (runtime.faults)."""

_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_folders(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest step first; never judged by file times."""
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _remove(folder: Path) -> None:
    """Remove a checkpoint: at no moment is a part of it taken for a whole."""
    if folder.exists():
        leaving = folder.with_name(folder.name + LEAVING)
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def manifest_model(model: ModelConfig) -> dict[str, Any]:
    """The shape as a manifest has it: what it is, not which preset it came from."""
    return {key: value for key, value in vars(model).items() if key != "preset"}


class HostCopy:
    """Host memory that keeps its place between saves: a copy then costs the copying alone."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies on the CPU, valid until the next call."""
        starts = [0, *accumulate(-(-tensor.nbytes // ALIGN) * ALIGN for tensor in tensors)]
        if self._memory.numel() < starts[-1]:
            pinned = any(tensor.is_cuda for tensor in tensors)
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
        copies = []
        for tensor, start in zip(tensors, starts, strict=False):
            copy = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor, non_blocking=True))
        if self._memory.is_pinned():
            torch.cuda.synchronize()
        return copies


class Checkpointer:
    """Writes and finds the checkpoints of one run. Every rank has one; all its calls are collective.

    A save that fails leaves the checkpoints before it untouched and the run going: rank 0 is told by `failed`.

    Args:
        root: folder that holds the checkpoints.
        model: what the run trains; checkpoints of another model are refused.
        keep: newest checkpoints kept; 0 = all.
        background: write in a thread; the step loop waits only for the copy to host memory, and, where saves overlap,
            for the save before.
        beside: models that are saved in the same checkpoints, by name; tensor t of model n is stored as n.t.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        model: ModelConfig,
        keep: int = 0,
        background: bool = False,
        beside: Mapping[str, ModelConfig] = MappingProxyType({}),
    ):
        self.root, self.mesh, self.model, self.keep, self.background = root, mesh, model, keep, background
        self.beside = beside
        self.shapes = canonical_shapes(model)
        for name, other in beside.items():
            self.shapes |= {f"{name}.{tensor}": shape for tensor, shape in canonical_shapes(other).items()}
        # A group of its own, because the writer thread talks while the step loop uses the others.
        self.group = dist.new_group(backend="gloo", timeout=SLOWEST) if mesh.world.size > 1 else None
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._failures: dict[int, str] = {}
        self._valid: Path | None = None  # newest one known to be: never removed to make room

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / f"step_{step:08d}"

    def save(self, step: int, slots: Iterable[tuple[Slot, Mapping[str, Tensor]]], meta: dict[str, Any]) -> None:
        """Write `root`/step_…; `meta` goes into the manifest. Waits for the save before."""
        self.wait()
        held = [(slot, state, values) for slot, states in slots if slot.owner for state, values in states.items()]
        tensors = [values for _, _, values in held]
        if self.background:
            tensors = self._host.take(tensors)
        parts = [
            Stored(state, slot.name, slot.rect, tensor.dtype, partial(_itself, tensor))
            for (slot, state, _), tensor in zip(held, tensors, strict=True)
        ]
        if self.background:
            self._thread = threading.Thread(target=self._try_write, args=(step, parts, meta), name=f"save-{step}")
            self._thread.start()
        else:
            self._try_write(step, parts, meta)

    def wait(self) -> None:
        """Wait for a save in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self) -> dict[int, str]:
        """Step -> why it has no checkpoint; each failure is told once."""
        return {step: self._failures.pop(step) for step in list(self._failures)}

    def _try_write(self, step: int, parts: list[Stored], meta: dict[str, Any]) -> None:
        try:
            self._write(step, parts, meta)
        except Exception as error:
            self._failures[step] = str(error)

    def _write(self, step: int, parts: list[Stored], meta: dict[str, Any]) -> None:
        """Prepare, write, commit: each phase begins when every rank has ended the one before. Rank 0 raises what went
        wrong anywhere."""
        rank, final = self.mesh.world.rank, self.folder(step)
        folder = final.with_name(final.name + UNFINISHED)
        sizes = self._gather(sum(part.rect.area * part.dtype.itemsize for part in parts))
        if self._agree(lambda: self._prepare(step, folder, sum(sizes))):
            return
        record: FileRecord | str
        try:
            record = write_rectangles(folder, f"rank_{rank:05d}.safetensors", parts)
        except Exception as error:  # every rank must reach the gather
            record = f"rank {rank}: {error}"
        records = self._gather(record)
        if rank == 0:
            try:
                if faults := [found for found in records if isinstance(found, str)]:
                    raise OSError("; ".join(faults))
                meta = {"step": step, "model": manifest_model(self.model), **meta}
                if self.beside:
                    meta[BESIDE] = {name: manifest_model(other) for name, other in self.beside.items()}
                write_manifest(folder, records, self.shapes, meta)
                _remove(final)  # a damaged one of a course that was given up
                folder.rename(final)
                sync(self.root)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._valid = final
            self._prune(step)

    def _prepare(self, step: int, folder: Path, size: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sync(self.root.parent)
        if size > shutil.disk_usage(folder).free:
            self._prune(step)
        free = shutil.disk_usage(folder).free
        if size > free:
            folder.rmdir()
            raise OSError(
                f"{self.root} has {free / 2**20:,.1f} MiB free, a checkpoint needs {size / 2**20:,.1f} MiB; free some "
                f"space, or remove old checkpoints (checkpoint.keep={self.keep})"
            )

    def _agree(self, act: Callable[[], None]) -> bool:
        """Let rank 0 `act`; whether that failed, on every rank. Rank 0 keeps the failure."""
        fault = None
        if self.mesh.world.rank == 0:
            try:
                act()
            except Exception as error:
                fault = error
        box = [fault is not None]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        if fault is not None:
            raise fault
        return box[0]

    def _gather(self, item: Any) -> list[Any]:
        """Every rank's `item` on rank 0, nothing elsewhere."""
        if self.group is None:
            return [item]
        out: list[Any] | None = [None] * self.mesh.world.size if self.mesh.world.rank == 0 else None
        dist.gather_object(item, out, dst=0, group=self.group)
        return out or []

    def _prune(self, step: int) -> None:
        """Remove the oldest up to `step`. Later ones are of a course that was given up, perhaps as they are damaged;
        counted among those to keep, they would push out the valid ones."""
        past = [folder for folder in checkpoint_folders(self.root) if _step(folder) <= step]
        for old in past[self.keep :] if self.keep else []:
            if old != self._valid:
                with suppress(OSError):  # somebody looks at it, or it is not ours
                    _remove(old)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints beyond `step`: those of a course that a resumed run does not go on with."""
        if self.mesh.world.rank == 0:
            for folder in checkpoint_folders(self.root):
                if _step(folder) > step:
                    _remove(folder)

    def sweep(self) -> list[str]:
        """Remove what a killed run left half-written (a line for each) or half-removed. For the owner of the folder."""
        lines = []
        if self.mesh.world.rank == 0 and self.root.is_dir():
            for path in sorted(self.root.glob(f"step_*{UNFINISHED}")):
                shutil.rmtree(path, ignore_errors=True)
                if not path.name.endswith(LEAVING):
                    lines.append(f"skipped checkpoint {path.stem}: its save was cut off; {path.name} is removed")
        return lines

    def load_newest(self, slots: Callable[[Store], Slots], note: Callable[[str], None]) -> Store | None:
        """Read the newest checkpoint that is valid for every rank; None where `root` has none.

        Args:
            slots: the rectangles to fill from a store, called anew for each try.
            note: told which checkpoints were skipped and why.

        Raises:
            ValueError: there are checkpoints, but none is valid, or they are of another model.
        """
        faults = []
        for folder in self.folders():
            store, fault = self._try(folder, slots)
            if store is not None:
                self._valid = folder
                return store
            faults.append(f"{folder.name}: {fault}")
            note(f"skipped checkpoint {folder.name}: {fault}")
        if faults:
            raise ValueError(
                f"no checkpoint under {self.root} is valid ({'; '.join(faults)}); if the files cannot be mended, "
                f"remove them, or set another output_dir, to start anew"
            )
        return None

    def folders(self) -> list[Path]:
        """The run's checkpoints, newest first, as rank 0 sees them: all ranks must try the same ones in one order."""
        box = [checkpoint_folders(self.root)]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def load(self, folder: Path, slots: Callable[[Store], Slots]) -> Store:
        """Read one checkpoint.

        Raises:
            ValueError: it is not valid, or of another model.
        """
        store, fault = self._try(folder, slots)
        if store is None:
            raise ValueError(f"checkpoint {folder} cannot be loaded: {fault}")
        return store

    def _try(self, folder: Path, slots: Callable[[Store], Slots]) -> tuple[Store | None, str]:
        """Read and verify all rectangles, then agree with all ranks on success."""
        store, fault = None, ""
        try:
            store = Store(folder)
        except (ValueError, OSError) as error:
            fault = str(error)
        if store is not None:
            self._require_model(store)
            fault = self._read(store, slots(store))
        if self.meet(bool(fault)):
            return None, fault or "another rank could not read it"
        return store, ""

    def meet(self, fault: bool = False) -> bool:
        """Wait for all ranks, whose disks may be unequally slow; whether one of them has a fault."""
        bad = torch.tensor([fault], dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(bad, group=self.group)
        return bool(bad)

    def _require_model(self, store: Store) -> None:
        """Shapes alone do not tell models apart: heads, rotary base and epsilon leave them as they are."""
        pairs = [("", self.model, store.manifest["model"])]
        pairs += [(f"{n}.", model, store.manifest.get(BESIDE, {}).get(n, {})) for n, model in self.beside.items()]
        wrong = [
            f"{where}{key} is {theirs.get(key, SINCE.get(key))} there, {value} here"
            for where, model, theirs in pairs
            for key, value in manifest_model(model).items()
            if key not in TRAINING_ONLY and theirs.get(key, SINCE.get(key)) != value
        ]
        if wrong:
            raise ValueError(
                f"{store.folder} is a checkpoint of another model: {', '.join(wrong)}; set model.* to its values, "
                f"or set another output_dir"
            )

    def _read(self, store: Store, slots: Slots) -> str:
        """Fill the slots; what went wrong, or nothing."""
        try:
            for slot, states in slots:
                expected, found = self.shapes[slot.name], store.shapes.get(slot.name)
                if found != expected:
                    raise ValueError(f"{slot.name} has shape {found} there, but {expected} in this model")
                for state, values in states.items():
                    store.read(state, slot.name, slot.rect, values)
        except (ValueError, OSError) as error:
            return str(error)
        return ""
