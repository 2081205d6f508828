"""Documents from files: JSONL (.jsonl .ndjson .json, also .gz and .zst), parquet and plain text, in pieces that many
workers can read at once.

A `Slice` is a piece of one file: bytes of an uncompressed file of lines, row groups of a parquet file, or a whole file.
A line belongs to the slice in which it begins, so consecutive slices give every document once and in order.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

JSONL, PARQUET, TEXT = "jsonl", "parquet", "text"
KINDS = {".jsonl": JSONL, ".ndjson": JSONL, ".json": JSONL, ".parquet": PARQUET}
KINDS |= dict.fromkeys((".txt", ".text", ".md", ".rst"), TEXT)
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"


class Slice(NamedTuple):
    """A piece of one file: [start, stop) in bytes, or in row groups of a parquet file; `size` is its bytes on disk."""

    path: str
    start: int
    stop: int
    size: int


class Record(NamedTuple):
    """One line, row or file.

    Attributes:
        line: its number inside the slice, from 1.
        text: the document (perhaps empty), or None where the record is bad.
        problem: why it is bad.
        raw: the first bytes of a bad record.
        done: bytes of the slice read so far.
    """

    line: int
    text: str | None
    problem: str
    raw: bytes
    done: int


@dataclass(frozen=True)
class Reading:
    """How documents are found in files.

    Args:
        json_keys: fields (columns of parquet) that make a document, joined by a blank line.
        split_lines: plain text holds a document a line instead of one a file.
        max_document_bytes: a longer record is bad.
    """

    json_keys: tuple[str, ...] = ("text",)
    split_lines: bool = False
    max_document_bytes: int = 64 << 20


def kind_of(path: str) -> tuple[str, str]:
    """(kind, compression suffix) of a file by its name.

    Raises:
        ValueError: the name does not tell.
    """
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in COMPRESSED else ""
    kind = KINDS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (compression and kind == PARQUET):
        raise ValueError(
            f"{path}: unknown kind of file; known are {' '.join(KINDS)}, all but parquet also with .gz or .zst"
        )
    return kind, compression


def find_files(inputs: Sequence[str]) -> list[str]:
    """The files named by `inputs`: files as given, folders searched through (sorted, hidden ones and foreign kinds left
    out).

    Raises:
        ValueError: an input is missing, of an unknown kind, or a folder without any known file.
    """
    files: list[str] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*") if p.is_file() and _is_known(p.relative_to(path)))
            if not found:
                raise ValueError(f"{name}: the folder holds no file of a known kind ({' '.join(KINDS)})")
            files += found
        elif path.is_file():
            kind_of(name)
            files.append(name)
        else:
            raise ValueError(f"{name}: no such file or folder")
    return files


def _is_known(path: Path) -> bool:
    try:
        kind_of(path.name)
    except ValueError:
        return False
    return not any(part.startswith(".") for part in path.parts)


def cut(files: Sequence[str], reading: Reading, slice_bytes: int) -> list[tuple[Slice, ...]]:
    """Work for many workers: groups of slices of about `slice_bytes` each, in the order of the files.

    Small files share a group; big ones are cut where their kind allows it. It depends on nothing but the files.
    """
    groups: list[tuple[Slice, ...]] = []
    open_group: list[Slice] = []
    for piece in (piece for path in files for piece in _slices(path, reading, slice_bytes)):
        if open_group and sum(s.size for s in open_group) + piece.size > slice_bytes:
            groups.append(tuple(open_group))
            open_group = []
        open_group.append(piece)
    return [*groups, tuple(open_group)] if open_group else groups


def _slices(path: str, reading: Reading, slice_bytes: int) -> Iterator[Slice]:
    (kind, compression), size = kind_of(path), os.path.getsize(path)
    if kind == PARQUET:
        groups = max(1, open_parquet(path).num_row_groups)
        for g in range(groups):
            yield Slice(path, g, g + 1, size // groups)
    elif compression or (kind == TEXT and not reading.split_lines):
        yield Slice(path, 0, size, size)
    else:
        for start in range(0, size, slice_bytes):
            stop = min(start + slice_bytes, size)
            yield Slice(path, start, stop, stop - start)


def read(piece: Slice, reading: Reading) -> Iterator[Record]:
    """The records of one slice, one for each line, row or file: bad ones come with their problem, blank lines as "".

    Raises:
        ValueError: the file cannot be read on: damaged compression, or a missing library.
    """
    kind, compression = kind_of(piece.path)
    if kind == PARQUET:
        yield from _read_rows(piece, reading)
        return
    with open(piece.path, "rb") as raw:
        try:
            stream = decompressed(raw, compression, piece.path)
            if kind == TEXT and not reading.split_lines:
                lines = iter([stream.read(reading.max_document_bytes + 1)])
            else:
                lines = _lines(stream, piece, reading.max_document_bytes)
            for number, line in enumerate(lines, 1):
                done = raw.tell() if compression else stream.tell() - piece.start
                yield _record(number, line, kind, reading, min(done, piece.size))
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd_error()) as error:
            raise ValueError(f"{piece.path}: the compressed data is damaged ({error}); mend or remove it") from None


def _lines(stream: IO[bytes], piece: Slice, limit: int) -> Iterator[bytes]:
    """Lines that begin in [start, stop) of an uncompressed stream, or all of a compressed one.

    Of a line longer than `limit` bytes only limit + 1 come, and the rest is skipped without keeping it.
    """
    whole = kind_of(piece.path)[1] != ""
    if piece.start:
        stream.seek(piece.start - 1)
        while (head := stream.readline(1 << 20)) and not head.endswith(b"\n"):
            pass  # the rest of a line that began in the slice before
    while whole or stream.tell() < piece.stop:
        line = rest = stream.readline(limit + 1)
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(1 << 20)
        if not line:
            return
        yield line


def _record(number: int, line: bytes, kind: str, reading: Reading, done: int) -> Record:
    """A line (or a whole text file) as a record."""
    if number == 1:
        line = line.removeprefix(BOM)
    problem, text = "", None
    if len(line) > reading.max_document_bytes:
        problem = f"longer than the limit of {reading.max_document_bytes} bytes"
    else:
        try:
            decoded = line.decode("utf-8")
            if kind == JSONL:
                text = _document(json.loads(decoded), reading.json_keys) if decoded.strip() else ""
            else:
                text = decoded.rstrip("\r\n") if reading.split_lines else decoded
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no character
        except UnicodeError as error:
            text, problem = None, f"not UTF-8: {error.reason if isinstance(error, UnicodeDecodeError) else error}"
        except RecursionError:
            text, problem = None, "not JSON: nested too deeply"
        except json.JSONDecodeError as error:
            text, problem = None, f"not JSON: {error}"
        except ValueError as error:
            text, problem = None, str(error)
    return Record(number, text, problem, b"" if text is not None else line[:65536], done)


def _document(fields: Any, keys: Sequence[str]) -> str:
    """The document in a JSON object or parquet row.

    Raises:
        ValueError: a key is missing or holds something else than text.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"no JSON object but {type(fields).__name__}")
    for key in keys:
        if key not in fields:
            raise ValueError(f"key {key!r} is missing; found {', '.join(map(repr, sorted(fields)[:8]))}")
        if not isinstance(fields[key], str):
            raise ValueError(f"key {key!r} holds {type(fields[key]).__name__}, not text")
    return "\n\n".join(fields[key] for key in keys)


def decompressed(raw: IO[bytes], compression: str, path: str) -> IO[bytes]:
    if compression == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: .zst files need: pip install zstandard") from None
        return io.BufferedReader(_Blocks(_zstd_blocks(raw, zstandard.ZstdDecompressor())), 1 << 17)
    return raw


def _zstd_blocks(raw: IO[bytes], decompressor: Any) -> Iterator[bytes]:
    """What the frames of a .zst file hold, block by block. (zstandard's own reader takes a file cut short for whole.)

    Raises:
        EOFError: the file ends inside a frame.
    """
    frame = None
    while data := raw.read(1 << 17):
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


class _Blocks(io.RawIOBase):
    """An iterator of bytes as a file to read from."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def zstd_error() -> type[Exception]:
    """zstandard's own exception, or one that is never raised where the library is missing."""
    try:
        from zstandard import ZstdError
    except ImportError:
        return EOFError
    return ZstdError


def open_parquet(path: str) -> Any:
    """A parquet file, opened without reading its rows."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet files need: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file ({error})") from None


def _read_rows(piece: Slice, reading: Reading) -> Iterator[Record]:
    """The rows of a slice's row groups."""
    file = open_parquet(piece.path)
    columns = [key for key in reading.json_keys if key in file.schema_arrow.names]
    if missing := sorted(set(reading.json_keys) - set(columns)):
        names = ", ".join(map(repr, file.schema_arrow.names[:8]))
        raise ValueError(f"{piece.path}: no column {missing[0]!r}; it has {names}: choose by --json-keys")
    groups = [g for g in range(piece.start, piece.stop) if g < file.num_row_groups]
    rows, number = sum(file.metadata.row_group(g).num_rows for g in groups), 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns):
        for row in batch.to_pylist():
            number += 1
            done = piece.size * number // rows
            problem, text = "", None
            try:
                text = _document(row, reading.json_keys)
                if len(text) > reading.max_document_bytes:
                    text, problem = None, f"longer than the limit of {reading.max_document_bytes} bytes"
            except ValueError as error:
                problem = str(error)
            yield Record(number, text, problem, b"" if text is not None else repr(row)[:65536].encode(), done)
