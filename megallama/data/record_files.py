"""Records out of files: JSON lines, a JSON list or parquet, each with its place for error messages."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .text import BOM, PARQUET, TEXT, decompressed, kind_of, open_parquet, zstd_error

A = TypeVar("A")
B = TypeVar("B")


class Origin(NamedTuple):
    """Where a record comes from: the line of a file of lines, the row of a JSON list or a parquet file; from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Row = tuple[Origin, dict[str, Any]]


def split_name(path: str | Path) -> tuple[str, dict[str, str]]:
    """FILE or FILE?theirs=ours&… -> (the file, its names of fields -> the names that readers know).

    Raises:
        ValueError: what stands behind the question mark is something else.
    """
    name = str(path)
    if "?" not in name or os.path.isfile(name):
        return name, {}
    file, _, query = name.rpartition("?")
    pairs = [tuple(part.split("=")) for part in query.split("&")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(f"{name}: behind ? stand names of fields as THEIRS=OURS, joined by &, not {query!r}")
    return file, dict(pairs)  # type: ignore[arg-type]


def read_rows(path: str | Path) -> list[Row]:
    """All records of a file; fields that are null are left out, as if missing.

    Args:
        path: FILE, or FILE?theirs=ours&… where its fields have names of their own (`split_name`).

    Raises:
        ValueError: no such file, of an unknown kind, damaged, without any record, or with one that is no JSON object;
            or no record has a field that is to be renamed.
    """
    name, names = split_name(path)
    if not os.path.isfile(name):
        raise ValueError(f"{name}: no such file of records")
    try:
        rows = convert(_raw(name), lambda raw, origin: (origin, _object(raw)))
        for field in names:
            if rows and not any(field in record for _, record in rows):
                raise ValueError(f"{name}: no record has a field {field!r}; the first has {', '.join(rows[0][1])}")
        rows = convert(rows, lambda record, origin: (origin, _renamed(record, names))) if names else rows
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd_error()) as error:
        raise ValueError(f"{name}: the compressed data is damaged ({error}); mend or remove it") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error})") from None
    if not rows:
        raise ValueError(f"{name}: holds no record")
    return rows


def convert(items: Iterable[tuple[Origin, A]], change: Callable[[A, Origin], B]) -> list[B]:
    """change(item, origin) of every item.

    Raises:
        ValueError: what `change` says of the first bad item, with its place, and the lines of other bad ones.
    """
    good: list[B] = []
    problem, lines = "", []
    for origin, item in items:
        try:
            good.append(change(item, origin))
        except ValueError as error:
            problem = problem or f"{origin}: {error}"
            lines.append(str(origin.line))
    if problem:
        more = f" ({len(lines) - 1} more bad, at {', '.join(lines[1:6])}{' …' * (len(lines) > 6)})" * (len(lines) > 1)
        raise ValueError(problem + more)
    return good


def _raw(name: str) -> Iterator[tuple[Origin, Any]]:
    """Every record as it stands in the file: bytes of a line, or the value in a list or a row."""
    kind, compression = kind_of(name)
    if kind == TEXT:
        raise ValueError(f"{name}: plain text holds no records; give .jsonl, .json (also .gz, .zst) or .parquet")
    if kind == PARQUET:
        rows = (row for batch in open_parquet(name).iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from ((Origin(name, n), row) for n, row in enumerate(rows, 1))
        return
    with open(name, "rb") as raw:
        data = decompressed(raw, compression, name).read().removeprefix(BOM)
    if data.lstrip()[:1] == b"[":  # no record begins so: it is one list
        try:
            items = json.loads(data)
        except UnicodeDecodeError as error:
            place = Origin(name, data.count(b"\n", 0, error.start) + 1)
            raise ValueError(f"{place}: not UTF-8: {error.reason}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{Origin(name, error.lineno)}: not JSON: {error}") from None
        except RecursionError:
            raise ValueError(f"{name}: not JSON: nested too deeply") from None
        yield from ((Origin(name, n), item) for n, item in enumerate(items, 1))
        return
    for n, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield Origin(name, n), line


def _renamed(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The record with its fields under other names."""
    for theirs, ours in names.items():
        if theirs in record and ours in record and ours not in names:
            raise ValueError(f"field {theirs!r} is to be read as {ours!r}, but the record has one of that name too")
    return {names.get(field, field): value for field, value in record.items()}


def _object(raw: Any) -> dict[str, Any]:
    """A JSON object, from its text if it still is text, without the fields that are null."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason}") from None
        except RecursionError:
            raise ValueError("not JSON: nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"no JSON object but {type(raw).__name__}")
    return {field: value for field, value in raw.items() if value is not None}
