"""What is wrong with a checkpoint of any format.

`survey` reads what it says of itself, `Survey.read` then every byte of it, in blocks and in a few threads: memory does
not grow with the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from megallama.checkpoint.formats.convert import SOURCES, Note
from megallama.checkpoint.formats.native import StoreSource
from megallama.checkpoint.formats.source import Source
from megallama.checkpoint.formats.tokenizer_files import GENERATION, TOKENIZER_FILES
from megallama.checkpoint.store import MANIFEST, Store
from megallama.config import ModelConfig
from megallama.parallel.pieces import Rect, matrix

T = TypeVar("T")
U = TypeVar("U")
Report = Callable[[int], None]
"""Told how many bytes more are done, from any thread."""

BLOCK = 1 << 18
"""Elements in memory at a time, in each thread and of each checkpoint."""

THREADS = min(4, os.cpu_count() or 1)
NAMED = 8
"""Corrupt chunks of a tensor that are told by number."""

WEIGHT, MOMENTS = "weight", {"exp_avg", "exp_avg_sq"}
COMPANIONS = {MANIFEST, *TOKENIZER_FILES, GENERATION}
"""Files of a checkpoint that its manifest does not list."""

MARKS = (
    (MANIFEST, "megallama"),
    ("checkpoints/step_*", "megallama"),
    ("step_*", "megallama"),
    ("latest_checkpointed_iteration.txt", "megatron"),
    ("mp_rank_*", "megatron"),
    ("config.json", "hf"),
    ("params.json", "meta"),
)
"""What lies in a folder -> its format; the first one found decides."""

FILES = {"hf": "*.safetensors", "meta": "consolidated.*.pth", "megatron": "mp_rank_*/*.pt", "epfl": "mp_rank_*/*.pt"}
"""Foreign format -> where its weights are."""


def recognise(folder: Path) -> str:
    """The format of what lies in a folder.

    Raises:
        ValueError: no checkpoint does.
    """
    for pattern, form in MARKS:
        if any(folder.glob(pattern)):
            return form
    raise ValueError(f"{folder} holds no checkpoint: there is no {', '.join(pattern for pattern, _ in MARKS)}")


def open_source(folder: Path, form: str | None, note: Note) -> tuple[str, Source]:
    """A checkpoint's weights and its format, which None leaves to what lies in the folder.

    Raises:
        ValueError: it is none, or damaged.
    """
    found = form or recognise(folder)
    try:
        return found, SOURCES[found](folder, None, note)
    except ValueError as error:
        if form or found != "megatron":
            raise
        try:  # the same files, told apart by what is in them
            return "epfl", SOURCES["epfl"](folder, None, note)
        except ValueError as other:
            said = dict.fromkeys((str(error), str(other)))
            raise ValueError("; or, as epfl: ".join(said)) from error


class Stream(NamedTuple):
    """Something to be read from end to end: `blocks` gives values, and whether their checksum holds. Messages call it
    `where`."""

    state: str
    name: str
    dtype: torch.dtype
    elements: int
    where: str
    blocks: Callable[[], Iterator[tuple[Tensor, bool]]]

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


class Measured(NamedTuple):
    """What reading a stream has shown: the sum of its finite values' squares, how many others there are, which blocks
    are corrupt, and why it could not be read to its end."""

    squares: float
    nonfinite: int
    corrupt: list[int]
    error: str = ""


def measure(stream: Stream, report: Report) -> Measured:
    """Read a stream; corrupt values do not count."""
    squares, nonfinite, corrupt, error = 0.0, 0, [], ""
    try:
        for n, (values, intact) in enumerate(stream.blocks()):
            if not intact:
                corrupt.append(n)
            for part in values.flatten().split(BLOCK) if intact else ():
                more, bad = finite_squares(part.double())
                squares, nonfinite = squares + more, nonfinite + bad
            report(values.nbytes)
    except ValueError as fault:
        error = str(fault)
    except OSError as fault:
        error = f"{stream.where}: {fault.strerror}"
    return Measured(squares, nonfinite, corrupt, error)


def finite_squares(values: Tensor) -> tuple[float, int]:
    """Sum of the squares of the finite ones of 1-D fp64 `values`, and the number of the others."""
    total = float(torch.dot(values, values))
    if math.isfinite(total):
        return total, 0
    finite = values[values.isfinite()]
    return float(torch.dot(finite, finite)), values.numel() - finite.numel()


def parallel(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """`work` on all items in a few threads, in order; what has not begun is dropped where the caller stops."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def weight_first(state: str) -> tuple[bool, str]:
    return state != WEIGHT, state


@dataclass
class Row:
    """A tensor: its weight's dtype, and of each state the root mean square of the finite values, None if damaged."""

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    rms: dict[str, float | None] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass
class Survey:
    """A checkpoint, and what is wrong with it.

    Attributes:
        about: what the manifest says of the run: version, step, consumed_samples, updates.
        model: None where that could not be made out.
        damage: what a reader stumbles over: something is not as it was written.
        faults: what a reader would take, but should not: values that are no numbers, what the manifest does not list.
        notes: what else is to be told.
        files: that hold weights.
        size: bytes of these.
    """

    folder: Path
    form: str
    about: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig | None = None
    damage: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    size: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return not self.damage and not self.faults

    @property
    def resumable(self) -> bool:
        """Whether a run would go on from here: it stops at damage only."""
        return self.form == "megallama" and not self.damage and set(self.states) >= MOMENTS

    @property
    def states(self) -> list[str]:
        """What is stored of the tensors, weight first."""
        return sorted({stream.state for stream in self.streams}, key=weight_first)

    @property
    def nbytes(self) -> int:
        """What `read` reads."""
        return sum(stream.nbytes for stream in self.streams)

    def damaged(self, fault: str) -> None:
        """Add a damage; files are named as seen from the folder."""
        self.damage.append(fault.replace(f"{self.folder}{os.sep}", ""))

    def add(self, stream: Stream) -> None:
        """Something more to be read."""
        self.streams.append(stream)
        if stream.state == WEIGHT:
            self.rows[stream.name].dtype = str(stream.dtype).removeprefix("torch.")

    def read(self, report: Report) -> None:
        """Read and verify every byte; completes the findings and the rows."""
        parts: dict[tuple[str, str], list[tuple[int, Measured]]] = {}
        for stream, found in zip(self.streams, parallel(partial(measure, report=report), self.streams), strict=True):
            self._judge(stream, found)
            parts.setdefault((stream.name, stream.state), []).append((stream.elements, found))
        for (name, state), measured in parts.items():
            self.rows[name].rms[state] = _rms(self.rows[name].elements, measured)

    def _judge(self, stream: Stream, found: Measured) -> None:
        if found.error:
            self.damaged(found.error)
        if found.corrupt:
            more = f" … ({len(found.corrupt):,} in all)" if len(found.corrupt) > NAMED else ""
            numbers = ", ".join(map(str, found.corrupt[:NAMED])) + more
            plural = "s" if len(found.corrupt) > 1 else ""
            self.damaged(f"{stream.where} is corrupt (checksum of its 4 MiB chunk{plural} {numbers})")
        if found.nonfinite:
            self.faults.append(f"{stream.where}: {found.nonfinite:,} of {stream.elements:,} values are NaN or infinite")


def _rms(elements: int, parts: list[tuple[int, Measured]]) -> float | None:
    """Of a whole tensor; None where a part is missing or damaged."""
    if sum(count for count, _ in parts) != elements or any(found.corrupt or found.error for _, found in parts):
        return None
    finite = elements - sum(found.nonfinite for _, found in parts)
    return math.sqrt(sum(found.squares for _, found in parts) / finite) if finite else math.nan


def survey(folder: Path, form: str | None = None) -> Survey:
    """What a checkpoint says of itself, and what is wrong with that; None leaves the format to what lies there.

    Raises:
        ValueError: nothing that is known lies there.
    """
    if (form or recognise(folder)) == "megallama":
        return _survey_store(folder)
    return _survey_source(folder, form)


def _survey_store(folder: Path) -> Survey:
    found = Survey(folder, "megallama")
    try:
        store = Store(folder, lambda fault: found.damaged(f"{MANIFEST} is damaged: {fault}"))
    except ValueError as error:
        found.damaged(str(error))
        return found
    found.about = {key: store.manifest.get(key) for key in ("version", "step", "consumed_samples", "updates")}
    found.rows = {name: Row(name, shape) for name, shape in store.shapes.items()}
    for file in store.files:
        _survey_file(found, store, file)
    if not found.damage:
        try:
            found.model = StoreSource(folder).model
        except ValueError as error:
            found.damaged(str(error))
    for path in sorted(folder.iterdir()):
        if path.name not in store.files and path.name not in COMPANIONS:
            strange = found.faults if path.suffix == ".safetensors" else found.notes
            strange.append(f"{path.name} is not in the manifest")
    return found


def _survey_file(found: Survey, store: Store, file: str) -> None:
    """One file's header against the manifest."""
    entries = store.files[file]
    try:
        opened = store.open(file)
    except ValueError as error:
        found.damaged(f"{error}; its {len(entries)} tensors cannot be read")
        return
    found.files, found.size = found.files + 1, found.size + opened.size
    found.faults += [f"{file}: tensor {key} is not in the manifest" for key in sorted(opened.specs.keys() - entries)]
    for key, entry in entries.items():
        where, size = f"{file}: tensor {key}", (entry.rect.height, entry.rect.width)
        if key not in opened.specs:
            found.damaged(f"{where} is missing")
        elif opened.specs[key].shape != size:
            found.damaged(f"{where} has shape {opened.specs[key].shape}, the manifest says {size}")
        else:
            dtype, blocks = opened.specs[key].dtype, partial(opened.chunks, key)
            found.add(Stream(entry.state, entry.name, dtype, entry.rect.area, where, blocks))


def _survey_source(folder: Path, form: str | None) -> Survey:
    found = Survey(folder, form or recognise(folder))
    try:
        found.form, source = open_source(folder, form, found.notes.append)
    except ValueError as error:
        found.damaged(str(error))
        return found
    files = [path for path in source.folder.glob(FILES[found.form]) if path.is_file()]
    found.model, found.files, found.size = source.model, len(files), sum(path.stat().st_size for path in files)
    found.rows = {name: Row(name, shape) for name, shape in source.shapes.items()}
    for name, row in found.rows.items():
        blocks = partial(_values, source, name)
        found.add(Stream(WEIGHT, name, source.dtypes[name], row.elements, f"tensor {name}", blocks))
    return found


def _values(source: Source, name: str) -> Iterator[tuple[Tensor, bool]]:
    """A tensor by blocks; foreign formats have no checksums that could fail."""
    for rect in row_blocks(source.shapes[name]):
        values = torch.empty(rect.height, rect.width, dtype=source.dtypes[name])
        source.read(name, rect, values)
        yield values, True


def row_blocks(shape: tuple[int, ...]) -> Iterator[Rect]:
    """A tensor's rows, a few at a time."""
    rows, cols = matrix(shape)
    step = max(1, BLOCK // cols)
    for r0 in range(0, rows, step):
        yield Rect(r0, min(rows, r0 + step), 0, cols)
