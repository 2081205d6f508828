"""A checkpoint format as data: which rectangle of which canonical tensor lies where in which file.

A format is a table, file -> key -> `Composite`. Reading looks a rectangle up in it, writing fills the files from it,
so that the two are inverse by construction. Rotary order, fused projections, shards, copies and padded vocabularies are
all composites: nothing else knows of them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megallama.checkpoint.formats.source import Source, read_fitting, require_inside
from megallama.checkpoint.tensors import DTYPES, WINDOW, Spec, sync
from megallama.config import ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Index, Rect, matrix


class Part(NamedTuple):
    """Rectangle `rect` of canonical tensor `name` lies in a stored tensor at rows first::step, columns from `col`."""

    name: str
    rect: Rect
    first: int = 0
    step: int = 1
    col: int = 0

    def down(self, rows: int) -> Part:
        """The same, `rows` further down."""
        return self._replace(first=self.first + rows)

    def rows(self, lo: int, hi: int) -> Part | None:
        """What of it lies in stored rows lo:hi, as seen from row lo."""
        k0 = max(0, -((self.first - lo) // self.step))
        k1 = min(self.rect.height, -((self.first - hi) // self.step))
        rect = self.rect._replace(r0=self.rect.r0 + k0, r1=self.rect.r0 + k1)
        return self._replace(rect=rect, first=self.first + k0 * self.step - lo) if k0 < k1 else None

    def columns(self, lo: int, hi: int) -> Part | None:
        """What of it lies in stored columns lo:hi, as seen from column lo."""
        c0, c1 = max(lo, self.col), min(hi, self.col + self.rect.width)
        shift = self.rect.c0 - self.col
        return self._replace(rect=self.rect._replace(c0=c0 + shift, c1=c1 + shift), col=c0 - lo) if c0 < c1 else None

    def view(self, stored: Tensor) -> Tensor:
        """Its elements in a stored matrix, (height, width)."""
        last = self.first + (self.rect.height - 1) * self.step
        return stored[self.first : last + 1 : self.step, self.col : self.col + self.rect.width]


class Composite(NamedTuple):
    """One tensor of a file; elements in no part are padding, and zero.

    Attributes:
        names: canonical tensors that it holds parts of, also where a shard of it holds none.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    parts: tuple[Part, ...]


Layout = Mapping[str, Mapping[str, Composite]]
"""File -> key -> what lies there."""


def whole(name: str, shape: tuple[int, ...], rows: int | None = None) -> Composite:
    """A canonical tensor as it is, padded to `rows`."""
    height, width = matrix(shape)
    padded = shape if rows is None else (rows, *shape[1:])
    return Composite(padded, (name,), (Part(name, Rect(0, height, 0, width)),))


def heads(name: str, first: int, count: int, head_dim: int, cols: int, interleaved: bool) -> Composite:
    """Heads first:first+count of a projection. Interleaved: a head's rotary pairs are neighbours, where the canonical
    order has all first ones of the pairs before all second ones."""
    half = head_dim // 2
    top, bottom = first * head_dim, (first + count) * head_dim
    if interleaved:
        parts = tuple(
            Part(name, Rect(top + at + n * half, top + at + (n + 1) * half, 0, cols), at + n, 2)
            for at in range(0, bottom - top, head_dim)
            for n in range(2)
        )
    else:
        parts = (Part(name, Rect(top, bottom, 0, cols)),)
    return Composite((bottom - top, cols), (name,), parts)


def stack(blocks: Iterable[Composite]) -> Composite:
    """One below the other."""
    parts: list[Part] = []
    names: dict[str, None] = {}
    height = width = 0
    for block in blocks:
        parts += [part.down(height) for part in block.parts]
        names |= dict.fromkeys(block.names)
        height, width = height + block.shape[0], block.shape[1]
    return Composite((height, width), tuple(names), tuple(parts))


def cut(composite: Composite, dim: int | None, index: int, count: int) -> Composite:
    """Shard `index` of `count` along `dim`; the whole where `dim` is None, a copy in every shard."""
    if dim is None:
        return composite
    step = composite.shape[dim] // count
    lo, hi = index * step, (index + 1) * step
    found = (part.rows(lo, hi) if dim == 0 else part.columns(lo, hi) for part in composite.parts)
    shape = tuple(step if n == dim else size for n, size in enumerate(composite.shape))
    return Composite(shape, composite.names, tuple(part for part in found if part))


class File(Protocol):
    """A file of named tensors, opened for reading: a TensorFile or a PickledFile."""

    path: Path
    specs: dict[str, Spec]

    def read(self, key: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a stored tensor to `out` (height, width), cast to its dtype."""


class Writer(Protocol):
    """A file being written."""

    def write(self, key: str, tensor: Tensor) -> Any:
        """Write one announced tensor."""


class Place(NamedTuple):
    """Where a part lies."""

    file: str
    key: str
    part: Part


class PlacedSource:
    """A source over opened files and the table of what lies in them. Copies of a rectangle are compared before it is
    read; the first one is.

    Args:
        layout: only keys that the files have, or should have.
        expects: what makes the shapes what they must be, for messages.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or of a dtype that holds no plain numbers.
    """

    def __init__(self, folder: Path, model: ModelConfig, layout: Layout, files: Mapping[str, File], expects: str):
        self.folder, self.model, self.shapes = folder, model, canonical_shapes(model)
        self._files = files
        self._index: Index[list[Place]] = Index()
        self._equal: set[tuple[str, Rect]] = set()
        self.dtypes: dict[str, torch.dtype] = {}
        placed: dict[tuple[str, Rect], list[Place]] = {}
        for file, tensors in layout.items():
            _check(files[file], tensors, expects)
            for key, composite in tensors.items():
                dtype = files[file].specs[key].dtype
                for part in composite.parts:
                    self.dtypes[part.name] = torch.promote_types(self.dtypes.get(part.name, dtype), dtype)
                    placed.setdefault((part.name, part.rect), []).append(Place(file, key, part))
        for (name, rect), places in placed.items():
            self._index.add(name, rect, places)

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width), cast to its dtype."""
        require_inside(self, name, rect)
        for overlap, held, places in self._index.cover(name, rect):
            if len(places) > 1 and (name, held) not in self._equal:
                self._require_equal(places)
                self._equal.add((name, held))
            inner = overlap.shift(-rect.r0, -rect.c0)
            self._read(places[0], overlap, out[inner.r0 : inner.r1, inner.c0 : inner.c1])

    def _read(self, place: Place, rect: Rect, out: Tensor) -> None:
        """Rectangle `rect` of a canonical tensor from one place that holds it."""
        file, part = self._files[place.file], place.part
        r0 = part.first + (rect.r0 - part.rect.r0) * part.step
        r1, c0 = r0 + (rect.height - 1) * part.step + 1, part.col + rect.c0 - part.rect.c0
        span = Rect(r0, r1, c0, c0 + rect.width)
        if part.step == 1:
            file.read(place.key, span, out)
            return
        rows = torch.empty(span.height, span.width, dtype=file.specs[place.key].dtype)
        file.read(place.key, span, rows)
        out.copy_(rows[:: part.step])

    def _require_equal(self, places: list[Place]) -> None:
        """Stop where copies differ: nothing says which of them the model has computed with."""
        first, *others = places
        name, rect = first.part.name, first.part.rect
        dtype = self.dtypes[name]
        step = max(1, WINDOW // (rect.width * dtype.itemsize))
        for r0 in range(rect.r0, rect.r1, step):
            block = rect._replace(r0=r0, r1=min(rect.r1, r0 + step))
            ours, theirs = (torch.empty(block.height, block.width, dtype=dtype) for _ in range(2))
            self._read(first, block, ours)
            for other in others:
                self._read(other, block, theirs)
                if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                    raise ValueError(
                        f"{name} has copies that differ: {first.key} in {self._files[first.file].path}, {other.key} in "
                        f"{self._files[other.file].path}; where you know the right one, save it in the place of both"
                    )


def _check(file: File, tensors: Mapping[str, Composite], expects: str) -> None:
    for key, composite in tensors.items():
        if key not in file.specs:
            raise ValueError(f"{file.path}: tensor {key} is missing")
        dtype, shape = file.specs[key]
        if shape != composite.shape:
            raise ValueError(f"{file.path}: {key} has shape {shape}, but {expects} makes it {composite.shape}")
        if dtype not in DTYPES.values():
            raise ValueError(f"{file.path}: {key} is stored as {dtype}; only {', '.join(DTYPES)} can be read")


def refuse_unknown(file: File, keys: Iterable[str], known: Iterable[str], expects: str) -> None:
    """Stop at a tensor that no table places: with it, the model would be another one.

    Raises:
        ValueError: names the first.
    """
    if unknown := sorted(set(keys) - set(known)):
        raise ValueError(f"{file.path}: tensor {unknown[0]} is not part of the Llama that {expects} describes")


def specs(source: Source, tensors: Mapping[str, Composite], dtype: torch.dtype | None) -> dict[str, Spec]:
    """What a file's tensors are stored as: `dtype`, or what loses nothing of theirs."""
    return {
        key: Spec(dtype or reduce(torch.promote_types, (source.dtypes[n] for n in names)), shape)
        for key, (shape, names, _) in tensors.items()
    }


def write_layout(
    source: Source,
    layout: Layout,
    dtype: torch.dtype | None,
    opened: Callable[[str, dict[str, Spec]], AbstractContextManager[Writer]],
) -> None:
    """Write all files of a layout, one tensor in memory at a time; `opened` starts a file of given tensors."""
    for file, tensors in layout.items():
        announced = specs(source, tensors, dtype)
        with opened(file, announced) as writer:
            for key, spec in announced.items():
                writer.write(key, assemble(source, tensors[key], spec.dtype))


def assemble(source: Source, composite: Composite, dtype: torch.dtype) -> Tensor:
    """One tensor of a file from its parts."""
    stored = torch.zeros(matrix(composite.shape), dtype=dtype)
    for part in composite.parts:
        read_fitting(source, part.name, part.rect, part.view(stored))
    return stored.view(composite.shape)


def full_name(folder: Path) -> Path:
    """The full name of a folder that another one, complete, can take the place of.

    Raises:
        ValueError: none can: it is the current directory or a mount point.
    """
    folder = Path(folder).resolve()
    kind = "the current directory" if folder == Path.cwd() else "a mount point" if os.path.ismount(folder) else ""
    if kind:
        raise ValueError(f"{folder} is {kind}, which a finished folder cannot replace; name a folder inside it")
    return folder


def refuse_existing(folder: Path) -> Path:
    """The folder's full name, once there is nothing under it.

    Raises:
        ValueError: there is something, or it cannot be replaced.
    """
    folder = full_name(folder)
    if folder.exists() and not is_empty(folder):
        raise ValueError(f"{folder} exists already; name a new folder, or an empty one")
    return folder


def is_empty(folder: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def unfinished(folder: Path) -> list[Path]:
    """Work folders beside `folder`, of attempts that still run or were killed."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    above = folder.parent
    return sorted(path for path in above.iterdir() if name.fullmatch(path.name)) if above.is_dir() else []


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name complete and on the disk, or not at all.

    Raises:
        ValueError: there is something under that name, now or at the end; what is finished then stays in the work
            folder, which the message names.
    """
    folder = refuse_existing(folder)
    with _work_folder(folder) as work:
        yield work
    with _kept(work, folder):
        work.rename(folder)  # takes the place of an empty folder, of nothing else
    sync(folder.parent)


@contextmanager
def replaced_folder(folder: Path, refuse: Callable[[Path], None]) -> Iterator[Path]:
    """As `new_folder`, in the place of a folder that `refuse` raises no ValueError for, now and at the end."""
    folder = full_name(folder)
    refuse(folder)
    with _work_folder(folder) as work:
        yield work
    earlier = work.with_suffix(".old")
    with _kept(work, folder):
        refuse(folder)
        folder.rename(earlier)
        try:
            work.rename(folder)
        except BaseException:
            earlier.rename(folder)
            raise
    sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """A folder of this attempt alone, on the file system of `folder`; what it holds is on the disk at the end."""
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        for path in (*work.rglob("*"), work):
            sync(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def _kept(work: Path, folder: Path) -> Iterator[None]:
    """Say where the finished work lies if it cannot get its name."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{folder}: the finished work could not take this name ({reason}); it is complete in {work}, rename that"
        ) from error
