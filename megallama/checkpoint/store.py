"""A checkpoint on disk: rectangles of canonical tensors in safetensors files and one JSON manifest; no pickle.

    step_00000500/manifest.json         what is where, sizes, and a CRC32 of every 4 MiB of every tensor
    step_00000500/rank_00000.safetensors …

Any layout reads any layout: a reader intersects its rectangles with the stored ones, reads just those bytes and
verifies just the chunks that it touches. docs/formats.md gives the manifest's fields.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from megallama.parallel.pieces import Index, Rect

FORMAT, VERSION = "megallama", 1
CHUNK = 4 << 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MANIFEST = "manifest.json"
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON of an unexpected structure raises."""


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


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).flatten().numpy().data


def checksums(data: memoryview) -> list[int]:
    """CRC32 of each chunk of `data`."""
    return [zlib.crc32(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def write_rectangles(folder: Path, file: str, parts: Iterable[tuple[str, str, Rect, Tensor]]) -> FileRecord:
    """Write (state, name, rectangle, values on the CPU) to `folder`/`file` and flush it to the disk."""
    entries, tensors = [], {}
    for state, name, rect, values in parts:
        entry = Entry(state, name, rect, checksums(_bytes(values)))
        entries.append(entry)
        tensors[entry.key] = values.contiguous()
    path = folder / file
    save_file(tensors, path)
    sync(path)
    return FileRecord(file, path.stat().st_size, entries)


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
    path.write_text(json.dumps({**manifest, "crc32": _signature(manifest)}))
    sync(path)
    sync(folder)


def _signature(manifest: dict[str, Any]) -> int:
    """CRC32 of a manifest without its own "crc32". JSON that was read is written alike again, so it can be checked."""
    return zlib.crc32(json.dumps({key: value for key, value in manifest.items() if key != "crc32"}).encode())


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _File:
    """One open safetensors file, its chunks verified on first touch."""

    def __init__(self, path: Path, size: int, crc32: dict[str, list[int]]):
        actual = path.stat().st_size if path.exists() else -1
        if actual != size:
            raise ValueError(
                f"{path}: {'missing' if actual < 0 else f'{actual} bytes'}, the manifest says {size} bytes"
            )
        with open(path, "rb") as handle:
            self.map = mmap(handle.fileno(), 0, access=ACCESS_READ)
        length = int.from_bytes(self.map[:8], "little")
        if length > size - 8:
            raise ValueError(f"{path}: the safetensors header claims {length} bytes of a file of {size}")
        self.path, self.crc32, self.start = path, crc32, 8 + length
        try:
            header = json.loads(self.map[8 : self.start])
            header.pop("__metadata__", None)
            self.header = {key: (DTYPES[info["dtype"]], *info["data_offsets"]) for key, info in header.items()}
        except _MALFORMED as error:
            raise ValueError(f"{path}: the safetensors header is corrupt: {error!r}") from error
        self.verified: set[tuple[str, int]] = set()

    def read(self, key: str, stored: Rect, wanted: Rect, out: Tensor) -> None:
        """Copy rectangle `wanted`, which lies in `stored`, to `out` (height, width)."""
        if key not in self.header:
            raise ValueError(f"{self.path}: tensor {key} is missing")
        dtype, lo, hi = self.header[key]
        if hi - lo != stored.area * dtype.itemsize or lo < 0 or self.start + hi > len(self.map):
            raise ValueError(
                f"{self.path}: tensor {key} has {hi - lo} bytes, its rectangle {tuple(stored)} another size"
            )
        row = stored.width * dtype.itemsize
        top, bottom = (wanted.r0 - stored.r0) * row, (wanted.r1 - stored.r0) * row
        self._verify(key, self.start + lo, self.start + hi, top, bottom)
        offset = self.start + lo + top
        rows = torch.frombuffer(bytearray(self.map[offset : offset + bottom - top]), dtype=dtype).view(-1, stored.width)
        out.copy_(rows[:, wanted.c0 - stored.c0 : wanted.c1 - stored.c0])

    def _verify(self, key: str, lo: int, hi: int, top: int, bottom: int) -> None:
        """Check the chunks of the tensor at lo:hi that its bytes top:bottom touch."""
        if len(self.crc32[key]) != -(-(hi - lo) // CHUNK):
            raise ValueError(f"{self.path}: tensor {key} of {hi - lo} bytes has {len(self.crc32[key])} checksums")
        for chunk in range(top // CHUNK, -(-bottom // CHUNK)):
            if (key, chunk) in self.verified:
                continue
            first = lo + chunk * CHUNK
            if zlib.crc32(self.map[first : min(hi, first + CHUNK)]) != self.crc32[key][chunk]:
                raise ValueError(f"{self.path}: tensor {key} is corrupt (checksum of its 4 MiB chunk {chunk})")
            self.verified.add((key, chunk))


class Store:
    """A checkpoint opened for reading.

    Attributes:
        manifest: its JSON: step, consumed_samples, model, ….
        shapes: canonical name -> shape.

    Raises:
        ValueError: no manifest, a damaged one, another format or version, or a file outside the folder.
    """

    def __init__(self, folder: Path):
        path = folder / MANIFEST
        try:
            self.manifest = json.loads(path.read_text())
            found = self.manifest.get("format"), self.manifest.get("version")
        except (OSError, *_MALFORMED) as error:
            raise ValueError(f"{folder} is not a checkpoint: {error}") from error
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: format {found}, but this version reads {(FORMAT, VERSION)}")
        if self.manifest.get("crc32") != _signature(self.manifest):
            raise ValueError(f"{path} is corrupt (its checksum)")
        self.folder = folder
        self._files: dict[str, _File] = {}
        self._index: dict[str, Index[tuple[str, str]]] = {}
        self._disjoint: set[tuple[str, str]] = set()
        try:
            self.shapes = {name: tuple(shape) for name, shape in self.manifest["shapes"].items()}
            for file, record in self.manifest["files"].items():
                self._add(file, record["size"], record["tensors"])
        except _MALFORMED as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _add(self, file: str, size: int, tensors: dict[str, list]) -> None:
        if os.path.basename(file) != file:
            raise ValueError(f"file {file!r} lies outside the checkpoint")
        for key, (state, name, *sides, crc32) in tensors.items():
            rect = Rect(*sides)
            if not (all(type(side) is int for side in rect) and 0 <= rect.r0 < rect.r1 and 0 <= rect.c0 < rect.c1):
                raise ValueError(f"{key} in {file}: {sides} is no rectangle")
            if type(size) is not int or type(crc32) is not list:
                raise ValueError(f"{key} in {file}: size {size!r} or checksums {crc32!r}")
            self._index.setdefault(state, Index()).add(name, rect, (file, key))

    def read(self, state: str, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a tensor's `state` to `out` (height, width), verified.

        Raises:
            ValueError: bytes are missing or corrupt; the message names file and tensor.
        """
        if state not in self._index:
            raise ValueError(f"{self.folder} holds no {state}: it has {', '.join(sorted(self._index))}")
        self._check_disjoint(state, name)
        for overlap, stored, (file, key) in self._index[state].cover(name, rect):
            place = overlap.shift(-rect.r0, -rect.c0)
            self._open(file).read(key, stored, overlap, out[place.r0 : place.r1, place.c0 : place.c1])

    def _check_disjoint(self, state: str, name: str) -> None:
        """Without overlaps, `cover` cannot take what is stored twice for what is missing elsewhere."""
        if (state, name) in self._disjoint:
            return
        rects = sorted(rect for rect, _ in self._index[state].by_name.get(name, ()))
        for n, rect in enumerate(rects):
            for other in islice(rects, n + 1, None):
                if other.r0 >= rect.r1:
                    break
                if rect.meet(other):
                    raise ValueError(f"{self.folder}: {state} of {name} is stored twice: {tuple(rect)}, {tuple(other)}")
        self._disjoint.add((state, name))

    def _open(self, file: str) -> _File:
        if file not in self._files:
            record = self.manifest["files"][file]
            crc32 = {key: entry[-1] for key, entry in record["tensors"].items()}
            self._files[file] = _File(self.folder / file, record["size"], crc32)
        return self._files[file]
