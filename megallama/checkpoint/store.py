"""A checkpoint on disk: rectangles of canonical tensors in safetensors files and one JSON manifest; no pickle.

    step_00000500/manifest.json         what is where, sizes, and a CRC32 of every 4 MiB of every tensor
    step_00000500/rank_00000.safetensors …

Any layout reads any layout: a reader intersects its rectangles with the stored ones, reads just those bytes and
verifies just the chunks that it touches. Nothing of the manifest is believed before it is proved: its own checksum,
every rectangle inside its tensor, every element once. docs/formats.md gives the manifest's fields.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.tensors import MALFORMED, Spec, TensorFile, TensorWriter, sync
from megallama.parallel.pieces import Index, Rect, matrix, overlapping

FORMAT, VERSION = "megallama", 1
MANIFEST = "manifest.json"
SEAL = ', "crc32": '
"""Before the manifest's own checksum, its last words."""

FIELDS = {
    "step": int,
    "consumed_samples": int,
    "updates": int,
    "model": dict,
    "fingerprints": dict,
    "shapes": dict,
    "files": dict,
}
"""What every manifest has."""


class Entry(NamedTuple):
    """One stored rectangle of one state (weight, exp_avg, exp_avg_sq) of canonical tensor `name`."""

    state: str
    name: str
    rect: Rect
    crc32: list[int]

    @property
    def key(self) -> str:
        """Its name inside the safetensors file."""
        return f"{self.state}/{self.name}/{self.rect.r0}_{self.rect.c0}"


class FileRecord(NamedTuple):
    """One safetensors file of a checkpoint."""

    file: str
    size: int
    entries: list[Entry]


class Stored(NamedTuple):
    """A rectangle to be stored; `values` gives its (height, width) tensor when its turn comes."""

    state: str
    name: str
    rect: Rect
    dtype: torch.dtype
    values: Callable[[], Tensor]


def write_rectangles(folder: Path, file: str, parts: Iterable[Stored]) -> FileRecord:
    """Write `folder`/`file`, one rectangle after another, and flush it to the disk."""
    specs, entries = {}, [(part, Entry(part.state, part.name, part.rect, [])) for part in parts]
    for part, entry in entries:
        specs[entry.key] = Spec(part.dtype, (part.rect.height, part.rect.width))
    with TensorWriter(folder / file, specs) as writer:
        written = [entry._replace(crc32=writer.write(entry.key, part.values())) for part, entry in entries]
    return FileRecord(file, writer.size, written)


def write_manifest(
    folder: Path, records: Iterable[FileRecord], shapes: dict[str, tuple[int, ...]], meta: dict[str, Any]
) -> None:
    """Write the manifest of all ranks' files; with it the checkpoint is complete."""
    files = {
        record.file: {
            "size": record.size,
            "tensors": {e.key: [e.state, e.name, *e.rect, e.crc32] for e in record.entries},
        }
        for record in records
    }
    manifest = {"format": FORMAT, "version": VERSION, **meta, "shapes": shapes, "files": files}
    path = folder / MANIFEST
    path.write_text(sealed(manifest))
    sync(path)
    sync(folder)


def sealed(manifest: dict[str, Any]) -> str:
    """A manifest as JSON; its last key is the CRC32 of it without that key."""
    text = json.dumps(manifest)
    return f"{text[:-1]}{SEAL}{zlib.crc32(text.encode())}}}"


def _is_sealed(text: str) -> bool:
    """Whether a manifest is as it was written."""
    body, _, seal = text.rpartition(SEAL)
    return seal == f"{zlib.crc32((body + '}').encode())}}}"


class Store:
    """A checkpoint opened for reading.

    Args:
        tell: told of each false word in the manifest, which is left out; without it, the first one is raised.

    Attributes:
        manifest: its JSON: step, consumed_samples, model, ….
        shapes: canonical name -> shape.
        files: file -> key -> the rectangle that lies there.

    Raises:
        ValueError: no manifest, a damaged one, another format or version, a file outside the folder, a rectangle
            outside its tensor, or elements that are missing or stored twice.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] | None = None):
        path = folder / MANIFEST
        try:
            text = path.read_text()
            self.manifest = json.loads(text)
            found = self.manifest.get("format"), self.manifest.get("version")
        except (OSError, *MALFORMED) as error:
            raise ValueError(f"{folder} is not a checkpoint: {error}") from error
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: format {found}, but this version reads {(FORMAT, VERSION)}")
        if not _is_sealed(text):
            raise ValueError(f"{path} is corrupt (its checksum)")
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, dict[str, Entry]] = {}
        self._opened: dict[str, TensorFile] = {}
        self._index: dict[str, Index[tuple[str, str]]] = {}
        for fault in self._take():
            if tell is None:
                raise ValueError(f"{path} is damaged: {fault}")
            tell(fault)

    def _take(self) -> Iterator[str]:
        """Take over what the manifest says; what is wrong with it."""
        try:
            self._check_fields()
            self.shapes = {name: _shape(name, shape) for name, shape in self.manifest["shapes"].items()}
        except MALFORMED as error:
            yield str(error)
            return
        for file, record in self.manifest["files"].items():
            try:
                tensors = _tensors(file, record)
            except MALFORMED as error:
                yield f"{file}: {error}"
                continue
            self.files[file] = {}
            for key, words in tensors.items():
                try:
                    self._add(file, key, *words)
                except MALFORMED as error:
                    yield f"{key} in {file}: {error}"
        yield from self._cover_faults()

    def _check_fields(self) -> None:
        for key, kind in FIELDS.items():
            value = self.manifest.get(key)
            if type(value) is not kind or (type(value) is int and value < 0):
                raise ValueError(f"{key} is {value!r}; it must be of type {kind.__name__}, and not negative")

    def _add(self, file: str, key: str, state: str, name: str, *rest: Any) -> None:
        *sides, crc32 = rest
        rect = Rect(*sides)
        if not (all(type(side) is int for side in rect) and 0 <= rect.r0 < rect.r1 and 0 <= rect.c0 < rect.c1):
            raise ValueError(f"{sides} is no rectangle")
        if name not in self.shapes:
            raise ValueError(f"{name} has no shape")
        rows, cols = matrix(self.shapes[name])
        if rect.r1 > rows or rect.c1 > cols:
            raise ValueError(f"{sides} lies outside of shape {self.shapes[name]}")
        if type(crc32) is not list:
            raise ValueError(f"checksums {crc32!r}")
        self._index.setdefault(state, Index()).add(name, rect, (file, key))
        self.files[file][key] = Entry(state, name, rect, crc32)

    def _cover_faults(self) -> Iterator[str]:
        """Every element of every state must be stored once."""
        if "weight" not in self._index:
            yield "it holds no weights"
        for state, index in self._index.items():
            for name, shape in self.shapes.items():
                rects = [rect for rect, _ in index.by_name.get(name, ())]
                missing = math.prod(shape) - sum(rect.area for rect in rects)
                if twice := overlapping(rects):
                    yield f"{state} of {name} is stored twice: {tuple(twice[0])}, {tuple(twice[1])}"
                elif missing:
                    yield f"{state} of {name}: {missing} of {math.prod(shape)} elements are missing"

    @property
    def states(self) -> list[str]:
        """What is stored of every tensor: weight, and of a run exp_avg and exp_avg_sq."""
        return sorted(self._index)

    def dtype(self, state: str, name: str) -> torch.dtype:
        """What holds all of a tensor's state as it is stored.

        Raises:
            ValueError: a file of it is missing or damaged.
        """
        kinds = []
        for _, (file, key) in self._rectangles(state).by_name[name]:
            if key not in self.open(file).specs:
                raise ValueError(f"{self.folder / file}: tensor {key} is missing")
            kinds.append(self.open(file).specs[key].dtype)
        return reduce(torch.promote_types, kinds)

    def read(self, state: str, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a tensor's `state` to `out` (height, width), verified.

        Raises:
            ValueError: bytes are missing or corrupt; the message names file and tensor.
        """
        for overlap, stored, (file, key) in self._rectangles(state).cover(name, rect):
            source = self.open(file)
            if source.specs.get(key, Spec(torch.uint8, ())).shape != (stored.height, stored.width):
                raise ValueError(f"{source.path}: tensor {key} is missing, or its shape is not {tuple(stored)}'s")
            place = overlap.shift(-rect.r0, -rect.c0)
            inner = overlap.shift(-stored.r0, -stored.c0)
            source.read(key, inner, out[place.r0 : place.r1, place.c0 : place.c1])

    def _rectangles(self, state: str) -> Index[tuple[str, str]]:
        if state not in self._index:
            raise ValueError(f"{self.folder} holds no {state}: it has {', '.join(self.states)}")
        return self._index[state]

    def open(self, file: str) -> TensorFile:
        """One of its files.

        Raises:
            ValueError: it is missing, of another size than the manifest says, or its header is corrupt.
        """
        if file not in self._opened:
            path, expected = self.folder / file, self.manifest["files"][file]["size"]
            size = path.stat().st_size if path.is_file() else -1
            if size != expected:
                found = "missing" if size < 0 else f"{size} bytes"
                raise ValueError(f"{path}: {found}, the manifest says {expected} bytes")
            self._opened[file] = TensorFile(path, {key: entry.crc32 for key, entry in self.files[file].items()})
        return self._opened[file]


def _tensors(file: str, record: dict[str, Any]) -> dict[str, list]:
    """What the manifest says of the tensors in a file."""
    if os.path.basename(file) != file:
        raise ValueError("it lies outside the checkpoint")
    if type(record["size"]) is not int or type(record["tensors"]) is not dict:
        raise ValueError(f"size {record['size']!r} and {type(record['tensors']).__name__} of tensors")
    return record["tensors"]


def _shape(name: str, sides: list[int]) -> tuple[int, ...]:
    if not (1 <= len(sides) <= 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError(f"{name} has shape {sides}")
    return tuple(sides)
