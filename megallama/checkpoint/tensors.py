"""One safetensors file, written tensor by tensor and read by byte ranges.

The safetensors package writes a file from tensors that all lie in memory, and reads by mapping it. Here neither side
ever holds more than a window of one tensor, and every 4 MiB can carry a checksum. Format: 8 bytes little-endian length
of a JSON header {key: {dtype, shape, data_offsets}}, the header, the tensors' bytes without gaps.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.parallel.pieces import Rect, matrix

CHUNK = 4 << 20
"""Bytes under one checksum."""

WINDOW = 32 << 20
"""Bytes read at a time where they cannot go straight to their place."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITE = 2
"""SYNC_FILE_RANGE_WRITE of <linux/fs.h>."""

LONGEST_HEADER = 100 << 20
"""Bytes; the safetensors package's own bound."""

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON of an unexpected structure raises."""


SUMS = ThreadPoolExecutor(1, "crc32")
"""Where checksums are worked out, while other bytes are on their way."""


class Spec(NamedTuple):
    """What a tensor is stored as."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(handle: int, size: int) -> None:
    """Give an open file its `size` bytes on the disk, where the file system can.

    fallocate(2) itself, because posix_fallocate writes zeros to every block where the file system cannot.

    Raises:
        OSError: the disk is full.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    while fallocate is not None and fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class TensorWriter:
    """Writes one file; a context manager, whose end without an error means that all bytes are on the disk.

    Args:
        specs: all tensors that will be written, in any order.
        metadata: strings for the header.

    Attributes:
        size: bytes of the file.

    Raises:
        OSError: the disk is full, before a byte is written where the file system can reserve space.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None):
        self.path, self.specs = path, dict(specs)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets: dict[str, int] = {}
        end = 0
        # Wide elements first: every tensor then starts at a multiple of its element's size.
        for key, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            self._offsets[key] = end
            end += spec.nbytes
            offsets = [self._offsets[key], end]
            header[key] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start, self.size = 8 + len(text), 8 + len(text) + end
        self._left = set(specs)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            reserve(self._handle, self.size)
            self._put(memoryview(len(text).to_bytes(8, "little") + text), 0)
        except BaseException:
            os.close(self._handle)
            raise
        self._flusher = Flusher(self._handle)

    def write(self, key: str, tensor: Tensor) -> list[int]:
        """Write one announced tensor, moved to the CPU if need be; the CRC32 of each of its chunks."""
        spec = self.specs[key]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{key}: {tensor.dtype} {tensor.shape} is not {spec}"
        data, at = as_bytes(tensor.cpu().contiguous()), self._start + self._offsets[key]
        chunks = range(0, len(data), CHUNK)
        crc32 = [SUMS.submit(zlib.crc32, data[lo : lo + CHUNK]) for lo in chunks]
        for lo in chunks:
            self._put(data[lo : lo + CHUNK], at + lo)
        self._left.remove(key)
        return [chunk.result() for chunk in crc32]

    def _put(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._handle, data, at)
            data, at = data[written:], at + written

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            failure = self._flusher.stop()
            if kind is None:
                assert not self._left, f"{self.path}: {sorted(self._left)} were announced, but not written"
                if failure is not None:
                    raise failure
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def start_writing(handle: int) -> None:
    """Have the kernel begin to write what it holds of a file: sync_file_range(2), which waits for nothing and asks for
    no barrier, else fsync."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is None:
        os.fsync(handle)
    else:
        start(handle, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(WRITE))


class Flusher:
    """Sends a file to the disk while it is still being written, so that the disk is never idle."""

    def __init__(self, handle: int):
        self._handle, self._over = handle, threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.05):
            try:
                start_writing(self._handle)
            except OSError as error:  # Linux tells of bytes that were lost once: a later fsync succeeds
                self._failure = error
                return

    def stop(self) -> OSError | None:
        """End; why bytes did not reach the disk."""
        self._over.set()
        self._thread.join()
        return self._failure


def read_at(path: Path, handle: int, at: int, into: memoryview) -> None:
    """Fill `into` with the bytes from `at` of the file that `handle` has opened.

    Raises:
        ValueError: the file ends before.
    """
    while into:
        count = os.preadv(handle, [into], at)
        if not count:
            raise ValueError(f"{path} ends at byte {at}; it has been truncated")
        into, at = into[count:], at + count


class TensorFile:
    """One file opened for reading: its header only.

    Args:
        crc32: key -> CRC32 of each chunk; a chunk is verified when it is touched first.

    Attributes:
        specs: what the tensors are.
        metadata: strings of the header.
        size: bytes of the file.

    Raises:
        ValueError: there is no such file, or its header is corrupt.
    """

    def __init__(self, path: Path, crc32: Mapping[str, list[int]] | None = None):
        self.path, self._crc32 = path, crc32
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        self._verified: set[tuple[str, int]] = set()
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(self.size - 8, LONGEST_HEADER):
                    raise ValueError(
                        f"{path}: the safetensors header claims {length} bytes of a file of {self.size} bytes"
                    )
                text = file.read(length)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        self._start = 8 + length
        try:
            header = json.loads(text)
            self.metadata = dict(header.pop("__metadata__", {}))
            for key, info in header.items():
                self._add(key, DTYPES[info["dtype"]], info["shape"], *info["data_offsets"])
            self._check_places()
        except MALFORMED as error:
            raise ValueError(f"{path}: the safetensors header is corrupt: {error!r}") from error

    def _add(self, key: str, dtype: torch.dtype, shape: list[int], lo: int, hi: int) -> None:
        spec = Spec(dtype, tuple(shape))
        if not all(type(number) is int and number >= 0 for number in (*shape, lo, hi)):
            raise ValueError(f"{key} of shape {shape} at {lo}:{hi}")
        if spec.nbytes != hi - lo:
            raise ValueError(f"{key} of shape {shape} needs {spec.nbytes} bytes, but has {hi - lo}")
        self.specs[key], self._offsets[key] = spec, lo

    def _check_places(self) -> None:
        """The tensors lie one after another, to the end of the file."""
        end = 0
        for key, lo in sorted(self._offsets.items(), key=lambda item: (item[1], self.specs[item[0]].nbytes)):
            if lo != end:
                raise ValueError(f"{key} lies at byte {lo}, the tensor before it ends at {end}")
            end += self.specs[key].nbytes
        if end != self.size - self._start:
            raise ValueError(f"tensors end at byte {end}, the file at {self.size - self._start}")

    def read(self, key: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of a tensor to `out` (height, width), cast to its dtype.

        Raises:
            ValueError: no such tensor or rectangle, or a corrupt chunk.
        """
        if key not in self.specs:
            raise ValueError(f"{self.path}: tensor {key} is missing")
        dtype, shape = self.specs[key]
        rows, cols = matrix(shape) if shape else (1, 1)
        if not (0 <= rect.r0 < rect.r1 <= rows and 0 <= rect.c0 < rect.c1 <= cols):
            raise ValueError(f"{self.path}: tensor {key} of shape {shape} has no rectangle {tuple(rect)}")
        row = cols * dtype.itemsize
        handle = os.open(self.path, os.O_RDONLY)  # not kept: a checkpoint may have more files than a process may open
        try:
            if rect.width == cols and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
                self._fill(handle, key, rect.r0 * row, as_bytes(out))
                return
            step = max(1, WINDOW // row)
            for r0 in range(rect.r0, rect.r1, step):
                r1 = min(rect.r1, r0 + step)
                window = torch.empty(r1 - r0, cols, dtype=dtype)
                self._fill(handle, key, r0 * row, as_bytes(window))
                out[r0 - rect.r0 : r1 - rect.r0].copy_(window[:, rect.c0 : rect.c1])
        finally:
            os.close(handle)

    def chunks(self, key: str) -> Iterator[tuple[Tensor, bool]]:
        """Each chunk of a tensor as 1-D values, and whether its checksum holds. One memory: the next takes its place.

        Raises:
            ValueError: the tensor has another number of checksums, or the file ends inside it.
        """
        dtype, size, crc32 = self.specs[key].dtype, self.specs[key].nbytes, self._checksums(key)
        memory = torch.empty(min(CHUNK, size) // dtype.itemsize, dtype=dtype)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            for first, expected in zip(range(0, size, CHUNK), crc32, strict=True):
                values = memory[: (min(size, first + CHUNK) - first) // dtype.itemsize]
                data = as_bytes(values)
                read_at(self.path, handle, self._start + self._offsets[key] + first, data)
                yield values, zlib.crc32(data) == expected
        finally:
            os.close(handle)

    def _checksums(self, key: str) -> list[int]:
        assert self._crc32 is not None, f"{self.path} was opened without checksums"
        size, crc32 = self.specs[key].nbytes, self._crc32[key]
        if len(crc32) != -(-size // CHUNK):
            raise ValueError(f"{self.path}: tensor {key} of {size} bytes has {len(crc32)} checksums")
        return crc32

    def _fill(self, handle: int, key: str, top: int, into: memoryview) -> None:
        """Read bytes from `top` of a tensor, verifying the chunks that they touch."""
        base, bottom = self._start + self._offsets[key], top + len(into)
        if self._crc32 is None:
            read_at(self.path, handle, base + top, into)
            return
        size, crc32 = self.specs[key].nbytes, self._checksums(key)
        sums: dict[int, Future[int]] = {}
        for chunk in range(top // CHUNK, -(-bottom // CHUNK)):
            first, last = chunk * CHUNK, min(size, chunk * CHUNK + CHUNK)
            lo, hi = max(first, top), min(last, bottom)
            part = into[lo - top : hi - top]
            if (key, chunk) in self._verified:
                read_at(self.path, handle, base + lo, part)
                continue
            whole = part if (lo, hi) == (first, last) else memoryview(bytearray(last - first))
            read_at(self.path, handle, base + first, whole)
            sums[chunk] = SUMS.submit(zlib.crc32, whole)
            if whole is not part:
                part[:] = whole[lo - first : hi - first]
        for chunk, found in sums.items():
            if found.result() != crc32[chunk]:
                raise ValueError(f"{self.path}: tensor {key} is corrupt (checksum of its 4 MiB chunk {chunk})")
            self._verified.add((key, chunk))
