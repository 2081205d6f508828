"""A checkpoint format as data: which rectangle of which canonical tensor lies where in which file.

A format is a table, file -> key -> `Composite`. Reading looks a rectangle up in it, writing fills the files from it,
so that the two are inverse by construction. Rotary order, fused projections, shards, copies and padded vocabularies are
all composites: nothing else knows of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megallama.checkpoint.formats.source import Source, require_inside
from megallama.checkpoint.tensors import DTYPES, Spec, sync
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


class PlacedSource:
    """A source over opened files and the table of what lies in them.

    Args:
        layout: only keys that the files have, or should have.
        expects: what makes the shapes what they must be, for messages.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or of a dtype that holds no plain numbers.
    """

    def __init__(self, folder: Path, model: ModelConfig, layout: Layout, files: Mapping[str, File], expects: str):
        self.folder, self.model, self.shapes = folder, model, canonical_shapes(model)
        self._files = files
        self._index: Index[tuple[str, str, Part]] = Index()
        self.dtypes: dict[str, torch.dtype] = {}
        placed: set[tuple[str, Rect]] = set()
        for file, tensors in layout.items():
            _check(files[file], tensors, expects)
            for key, composite in tensors.items():
                for part in composite.parts:
                    self.dtypes.setdefault(part.name, files[file].specs[key].dtype)
                    if (part.name, part.rect) not in placed:  # else a copy
                        placed.add((part.name, part.rect))
                        self._index.add(part.name, part.rect, (file, key, part))

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width), cast to its dtype."""
        require_inside(self, name, rect)
        for overlap, held, (file, key, part) in self._index.cover(name, rect):
            place = overlap.shift(-rect.r0, -rect.c0)
            target = out[place.r0 : place.r1, place.c0 : place.c1]
            r0 = part.first + (overlap.r0 - held.r0) * part.step
            r1, c0 = r0 + (overlap.height - 1) * part.step + 1, part.col + overlap.c0 - held.c0
            span = Rect(r0, r1, c0, c0 + overlap.width)
            if part.step == 1:
                self._files[file].read(key, span, target)
                continue
            rows = torch.empty(span.height, span.width, dtype=self._files[file].specs[key].dtype)
            self._files[file].read(key, span, rows)
            target.copy_(rows[:: part.step])


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
        source.read(part.name, part.rect, part.view(stored))
    return stored.view(composite.shape)


def refuse_existing(folder: Path) -> Path:
    """The folder's full name, once there is nothing under it.

    Raises:
        ValueError: there is something.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; name a new folder, or an empty one")
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name complete and on the disk, or not at all.

    Raises:
        ValueError: there is something under that name already.
    """
    with replaced_folder(refuse_existing(folder)) as work:
        yield work


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As `new_folder`, in the place of whatever is there."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        for path in (*work.rglob("*"), work):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
