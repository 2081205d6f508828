"""From any format to any other: what each is read by and written by."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.formats.hf import SHARD_BYTES, HFSource, write_hf
from megallama.checkpoint.formats.megatron import write_megatron
from megallama.checkpoint.formats.megatron_source import open_megatron
from megallama.checkpoint.formats.meta import open_meta, published_shards, write_meta
from megallama.checkpoint.formats.native import StoreSource, write_store
from megallama.checkpoint.formats.placement import refuse_existing
from megallama.checkpoint.formats.source import Source
from megallama.config import SCALAR
from megallama.parallel.pieces import Rect

Note = Callable[[str], None]
"""Told what a checkpoint does not say, and what of it was passed over."""


@dataclass(frozen=True)
class Target:
    """How to write; a format uses the part that means something to it.

    Args:
        dtype: of all tensors; None = each its own.
        tp: tensor-parallel ranks or Meta's shards; None = 1, or as many as Meta published.
        pp: pipeline ranks.
        vpp: chunks of each pipeline rank.
        order: Megatron's dialect.
        max_shard_bytes: largest weight file of HF's.
        tokenizer: goes along.
        like: folder whose generation settings are kept.
    """

    dtype: torch.dtype | None = None
    tp: int | None = None
    pp: int = 1
    vpp: int = 1
    order: str = "core"
    max_shard_bytes: int = SHARD_BYTES
    tokenizer: Path | None = None
    like: Path | None = None


SOURCES: dict[str, Callable[[Path, int | None, Note], Source]] = {
    "megallama": lambda folder, _size, note: StoreSource(folder, note),
    "hf": lambda folder, _size, _note: HFSource(folder),
    "meta": lambda folder, _size, _note: open_meta(folder),
    "megatron": lambda folder, size, note: open_megatron(folder, False, size, note),
    "epfl": lambda folder, size, note: open_megatron(folder, True, size, note),
}
"""Format -> its source, from a folder and the true vocabulary size if the user gives it."""

WRITERS: dict[str, Callable[[Source, Path, Target], None]] = {
    "megallama": lambda source, folder, to: write_store(source, folder, (to.tp or 1, to.pp), to.dtype, to.tokenizer),
    "hf": lambda source, folder, to: write_hf(source, folder, to.dtype, to.max_shard_bytes, to.tokenizer, to.like),
    "meta": lambda source, folder, to: write_meta(
        source, folder, to.tp or published_shards(source.model), to.dtype, to.tokenizer
    ),
    "megatron": lambda source, folder, to: write_megatron(
        source, folder, (to.tp or 1, to.pp, to.vpp), to.order, to.dtype, to.tokenizer
    ),
}


SCALAR_FORMATS = ("megallama", "hf")
"""Those that know reward models."""


class Watched:
    """A source that tells `report` how many bytes more have been read of it; what is read again does not count."""

    def __init__(self, source: Source, report: Callable[[int], None]):
        self.folder, self.model, self.shapes, self.dtypes = source.folder, source.model, source.shapes, source.dtypes
        self._source, self._report = source, report
        self._left = {name: math.prod(shape) for name, shape in source.shapes.items()}

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """As the source's."""
        self._source.read(name, rect, out)
        new = min(self._left[name], rect.area)
        self._left[name] -= new
        self._report(new * self.dtypes[name].itemsize)


class Sizes(NamedTuple):
    """What is to be converted.

    Attributes:
        stored: bytes of all tensors in the source.
        written: of the same in the target, without padding and copies.
        largest: of the biggest tensor in the target.
    """

    tensors: int
    stored: int
    written: int
    largest: int


def sizes(source: Source, dtype: torch.dtype | None) -> Sizes:
    """How much there is to do."""
    counts = {name: math.prod(shape) for name, shape in source.shapes.items()}
    written = {name: count * (dtype or source.dtypes[name]).itemsize for name, count in counts.items()}
    stored = sum(count * source.dtypes[name].itemsize for name, count in counts.items())
    return Sizes(len(counts), stored, sum(written.values()), max(written.values()))


def convert(source: Source, form: str, folder: Path, target: Target, report: Callable[[int], None]) -> None:
    """Write `source` as format `form` to the new `folder`, which appears complete or not at all.

    Args:
        report: told of each few bytes of the source that are done.

    Raises:
        ValueError: the folder holds something, the disk is too full, the model cannot be laid out so, or the source is
            damaged.
    """
    if source.model.head == SCALAR and form not in SCALAR_FORMATS:
        raise ValueError(
            f"{source.folder} is a reward model; its scalar head has a place in {' and '.join(SCALAR_FORMATS)} only"
        )
    folder = refuse_existing(folder)
    above = next(path for path in folder.parents if path.exists())
    free, needed = shutil.disk_usage(above).free, sizes(source, target.dtype).written
    if needed > free:
        raise ValueError(f"{above} has {free / 1e9:.1f} GB free, {folder.name} needs {needed / 1e9:.1f} GB; free some")
    WRITERS[form](Watched(source, report), folder, target)
