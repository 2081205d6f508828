"""Saving and loading a run's checkpoints: commit by rename, newest valid one first, in the background if wanted."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.checkpoint.store import FileRecord, Store, sync, write_manifest, write_rectangles
from megallama.config import ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.collectives import all_reduce
from megallama.parallel.pieces import Piece, Slot
from megallama.runtime.mesh import Mesh

Slots = Iterable[tuple[Slot | Piece, Mapping[str, Tensor]]]
"""Canonical rectangles of a rank, each with its states as (height, width) views."""

_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_folders(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest step first; never judged by file times."""
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


class Checkpointer:
    """Writes and finds the checkpoints of one run. Every rank has one; all its calls are collective.

    Args:
        root: folder that holds the checkpoints.
        model: what the run trains; checkpoints of another model are refused.
        keep: newest checkpoints kept; 0 = all.
        background: write in a thread; the step loop waits only for the copy to host memory.
    """

    def __init__(self, root: Path, mesh: Mesh, model: ModelConfig, keep: int = 0, background: bool = False):
        self.root, self.mesh, self.model, self.keep, self.background = root, mesh, model, keep, background
        self.shapes = canonical_shapes(model)
        # A group of its own, because the writer thread talks while the step loop uses the others.
        self.group = dist.new_group(backend="gloo") if mesh.world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.root / f"step_{step:08d}"

    def save(self, step: int, slots: Iterable[tuple[Slot, Mapping[str, Tensor]]], meta: dict[str, Any]) -> None:
        """Write `root`/step_…; `meta` goes into the manifest. Waits for the save before, and raises its failure."""
        self.wait()
        parts = [
            (state, slot.name, slot.rect, values.to("cpu", copy=True))
            for slot, states in slots
            if slot.owner
            for state, values in states.items()
        ]
        if not self.background:
            self._write(step, parts, meta)
            return

        def work() -> None:
            try:
                self._write(step, parts, meta)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=work, name=f"save-{step}")
        self._thread.start()

    def failed(self) -> str | None:
        """What went wrong with a save in the background, told once; the checkpoints before it are untouched."""
        if self._failure is None or self._thread is None or self._thread.is_alive():
            return None
        failure, self._failure, self._thread = self._failure, None, None
        return str(failure)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            OSError: that save failed; the checkpoints before it are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise OSError(f"the last checkpoint could not be written: {failure}") from failure

    def _write(self, step: int, parts: list, meta: dict[str, Any]) -> None:
        rank = self.mesh.world.rank
        final = self.folder(step)
        folder = final.with_name(final.name + ".tmp")
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._gather(None)  # nobody writes before the folder is there
        record: FileRecord | Exception
        try:
            record = write_rectangles(folder, f"rank_{rank:05d}.safetensors", parts)
        except Exception as error:  # every rank must reach the gather
            record = OSError(f"rank {rank}: {error}")
        records = self._gather(record)
        if rank == 0:
            try:
                for found in records:
                    if isinstance(found, Exception):
                        raise found
                write_manifest(folder, records, self.shapes, {"step": step, "model": _identity(self.model), **meta})
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
                sync(self.root)
                self._prune(step)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def _gather(self, item: Any) -> list[Any]:
        if self.group is None:
            return [item]
        out: list[Any] | None = [None] * self.mesh.world.size if self.mesh.world.rank == 0 else None
        dist.gather_object(item, out, dst=0, group=self.group)
        dist.barrier(self.group)
        return out or []

    def _prune(self, step: int) -> None:
        """Remove the oldest up to `step`. Later ones are of a course that was given up, perhaps as they are damaged;
        counted among those to keep, they would push out the valid ones."""
        past = [folder for folder in checkpoint_folders(self.root) if _step(folder) <= step]
        for old in past[self.keep :] if self.keep else []:
            shutil.rmtree(old)

    def load_newest(self, slots: Callable[[], Slots], note: Callable[[str], None]) -> Store | None:
        """Read the newest checkpoint that is valid for every rank; None where `root` has none.

        Args:
            slots: the rectangles to fill, called anew for each try.
            note: told which checkpoints were skipped and why.

        Raises:
            ValueError: there are checkpoints, but none is valid, or they are of another model.
        """
        faults = []
        for folder in self.folders():
            store, fault = self._try(folder, slots())
            if store is not None:
                return store
            faults.append(f"{folder.name}: {fault}")
            note(f"skipped checkpoint {folder.name}: {fault}")
        if faults:
            raise ValueError(
                f"no checkpoint under {self.root} is valid ({'; '.join(faults)}); "
                f"remove them, or set another output_dir, to start anew"
            )
        return None

    def folders(self) -> list[Path]:
        """The run's checkpoints, newest first, as rank 0 sees them: all ranks must try the same ones in one order."""
        box = [checkpoint_folders(self.root)]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def load(self, folder: Path, slots: Callable[[], Slots]) -> Store:
        """Read one checkpoint.

        Raises:
            ValueError: it is not valid, or of another model.
        """
        store, fault = self._try(folder, slots())
        if store is None:
            raise ValueError(f"checkpoint {folder} cannot be loaded: {fault}")
        return store

    def _try(self, folder: Path, slots: Slots) -> tuple[Store | None, str]:
        """Read and verify all rectangles, then agree with all ranks on success."""
        store, fault = None, ""
        try:
            store = Store(folder)
        except (ValueError, OSError) as error:
            fault = str(error)
        if store is not None:
            self._require_model(store)
            fault = self._read(store, slots)
        bad = torch.tensor([float(bool(fault))], device=self.mesh.device)
        if all_reduce(bad, self.mesh.world).item():
            return None, fault or "another rank could not read it"
        return store, ""

    def _require_model(self, store: Store) -> None:
        """Shapes alone do not tell models apart: heads, rotary base and epsilon leave them as they are."""
        theirs, ours = store.manifest.get("model", {}), _identity(self.model)
        wrong = [
            f"{key} is {theirs.get(key)} there, {value} here" for key, value in ours.items() if theirs.get(key) != value
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


def _identity(model: ModelConfig) -> dict[str, Any]:
    """What two runs must share to be of one model."""
    free = {"preset", "initializer_range", "max_position_embeddings"}
    return {key: value for key, value in vars(model).items() if key not in free}
