"""Megatron's indexed dataset: PREFIX.bin holds token ids back to back, PREFIX.idx says where each document begins.

Layout of the .idx, little-endian: magic (9 bytes), u64 version 1, u8 dtype code, u64 sequences, u64 document
boundaries; then i32 length[sequences], i64 byte offset[sequences], i64 boundary[boundaries] (in sequences, first 0) and
perhaps i8 mode[sequences], which is ignored. A document is a run of consecutive sequences, usually one.

Opening reads the header and the first and last entries only, so it costs the same for a thousand documents and for a
billion; each lookup checks the entries that it uses.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}.items()
}
CHUNK = 1 << 20  # entries handled at a time where a file is scanned or written


def best_dtype(vocab_size: int) -> np.dtype:
    """The narrowest id type that other readers of the format also choose: u16 below 65,500 ids, else i32."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


def pread(file: IO[bytes], at: int, size: int) -> bytes:
    """Bytes [at, at + size) of an open file.

    Files are read like this and not mapped: resident memory does not grow with what has been visited, and a file that
    shrinks while it is in use is an error instead of a crash.

    Raises:
        ValueError: the file ends before.
    """
    blocks, end = [], at + size
    while at < end:
        block = os.pread(file.fileno(), min(end - at, 1 << 30), at)
        if not block:
            raise ValueError(f"{file.name}: ends at byte {at}, it was longer when opened; was it rewritten?")
        blocks.append(block)
        at += len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


@dataclass(frozen=True)
class Column:
    """One array of integers inside an .idx file: `count` entries of `dtype` from byte `at`."""

    file: IO[bytes]
    at: int
    count: int
    dtype: np.dtype

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> int:
        """Entry k, 0 <= k < count."""
        width = self.dtype.itemsize
        return int.from_bytes(pread(self.file, self.at + k * width, width), "little", signed=True)

    def block(self, lo: int, hi: int) -> np.ndarray:
        """Entries [lo, min(hi, count)), in the native order of bytes."""
        width, hi = self.dtype.itemsize, min(hi, self.count)
        return np.frombuffer(pread(self.file, self.at + lo * width, (hi - lo) * width), self.dtype)


class Index(NamedTuple):
    """An .idx file, opened: type of the tokens, and its three arrays."""

    dtype: np.dtype
    lengths: Column
    offsets: Column
    boundaries: Column


def open_index(path: Path) -> Index:
    """Open an .idx file, checking the header and that the counts fit the file's size.

    Raises:
        ValueError: no such file, wrong magic, version or dtype code, or counts that the file cannot hold.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a source is named by its prefix, the path without .bin or .idx")
    file = path.open("rb", buffering=0)
    size = os.fstat(file.fileno()).st_size
    if size < HEADER.size:
        raise ValueError(f"{path}: {size} bytes cannot hold the {HEADER.size}-byte header; preprocess it again")
    magic, version, code, sequences, boundaries = HEADER.unpack(pread(file, 0, HEADER.size))
    if magic != MAGIC:
        raise ValueError(f"{path}: begins with {magic!r} instead of {MAGIC!r}; it is not an indexed dataset")
    if version != 1:
        raise ValueError(f"{path}: format version {version}, only version 1 is known; preprocess it again")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise ValueError(f"{path}: dtype code {code} is no integer type (1-5 and 8 are); preprocess it again")
    # Python integers do not overflow, so an absurd count cannot wrap round to a size that fits.
    need = HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size not in (need, need + sequences):
        raise ValueError(
            f"{path}: {sequences} sequences and {boundaries} document boundaries need {need} bytes, "
            f"the file has {size}; it is truncated or damaged: preprocess or copy it again"
        )
    at, length, place = HEADER.size, np.dtype("<i4"), np.dtype("<i8")
    return Index(
        DTYPES[code],
        Column(file, at, sequences, length),
        Column(file, at + sequences * 4, sequences, place),
        Column(file, at + sequences * 12, boundaries, place),
    )


class IndexedDataset:
    """The documents of one tokenised corpus, and the same tokens as one flat stream.

    Args:
        prefix: path without .bin or .idx.

    Raises:
        ValueError: the files are missing, damaged, or do not belong together; says which number is off.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = os.fspath(prefix)
        self.index_path, self.data_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self.dtype, self._lengths, self._offsets, self._boundaries = open_index(self.index_path)
        if not self.data_path.is_file():
            raise ValueError(f"{self.data_path}: no such file, but {self.index_path} is there; copy both")
        self._data = self.data_path.open("rb", buffering=0)
        self._check_ends(os.fstat(self._data.fileno()).st_size)

    def _check_ends(self, size: int) -> None:
        """First and last entries of the index against each other and against the .bin's `size` in bytes."""
        sequences, width = self.num_sequences, self.dtype.itemsize
        first, last = (
            (self._boundaries[0], self._boundaries[len(self._boundaries) - 1])
            if len(self._boundaries)
            else (None, None)
        )
        if (first, last) != (0, sequences):
            raise ValueError(
                f"{self.index_path}: document boundaries run {first} … {last}, expected 0 … {sequences}, "
                "the number of its sequences; it is damaged: preprocess it again"
            )
        end = 0
        if sequences:
            begin, tail, length = self._offsets[0], self._offsets[sequences - 1], self._lengths[sequences - 1]
            if begin != 0 or tail < 0 or tail % width or length < 0 or self._lengths[0] < 0:
                raise ValueError(
                    f"{self.index_path}: first offset {begin}, last offset {tail}, last length {length} are no places "
                    f"in a stream of {width}-byte tokens; it is damaged: preprocess it again"
                )
            end = tail + length * width
        if end > size:
            raise ValueError(
                f"{self.data_path}: {size} bytes, but {self.index_path.name} needs {end}; "
                "it is truncated or belongs to another index: preprocess or copy both again"
            )
        self.num_tokens = end // width

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple:
        return IndexedDataset, (self.prefix,)  # another process opens the files itself

    @property
    def num_documents(self) -> int:
        return len(self._boundaries) - 1

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    def document_start(self, k: int) -> int:
        """Token offset of document k, 0 <= k <= num_documents (the last one is the end of the stream).

        Raises:
            ValueError: the index's entry is damaged.
        """
        sequence = self._boundaries[k]
        if sequence == self.num_sequences:
            return self.num_tokens
        offset = self._offsets[sequence] if 0 <= sequence < self.num_sequences else -1
        start, rest = divmod(offset, self.dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            raise ValueError(
                f"{self.index_path}: document {k} begins at sequence {sequence} of {self.num_sequences}, "
                f"byte {offset}: the entry is damaged; preprocess it again"
            )
        return start

    def document(self, k: int) -> np.ndarray:
        """Token ids of document k, (length,) in the file's dtype.

        Raises:
            IndexError: k is not in [0, num_documents).
        """
        if not 0 <= k < self.num_documents:
            raise IndexError(f"document {k} of {self.prefix}: it has documents 0 to {self.num_documents - 1}")
        return self.tokens(self.document_start(k), self.document_start(k + 1))

    def document_lengths(self, lo: int, hi: int) -> np.ndarray:
        """Tokens of documents [lo, hi), int64, read as blocks of the index.

        Raises:
            ValueError: the boundaries are damaged.
        """
        boundaries = self._boundaries.block(lo, hi + 1)
        if (np.diff(boundaries, prepend=0, append=self.num_sequences) < 0).any():
            raise ValueError(f"{self.index_path}: boundaries of documents {lo} to {hi} descend; preprocess it again")
        lengths = self._lengths.block(int(boundaries[0]), int(boundaries[-1]))
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.diff(ends[boundaries - boundaries[0]])

    def document_at(self, token: int) -> int:
        """The document that holds token number `token` of the stream; O(log n)."""
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_starts(self, lo: int, hi: int) -> np.ndarray:
        """Token offsets in [lo, hi) at which a document begins, ascending, int64; O(log n + found)."""
        starts: list[int] = []
        for k in range(bisect_left(range(self.num_documents), lo, key=self.document_start), self.num_documents):
            start = self.document_start(k)
            if start >= hi:
                break
            if not starts or start > starts[-1]:  # an empty document begins where the next one does
                starts.append(start)
        return np.array(starts, np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, (stop - start,) in the file's dtype.

        Raises:
            ValueError: the window is not inside the stream, or the file has become shorter.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"{self.data_path}: tokens {start} to {stop} asked of a stream of {self.num_tokens}; "
                "the index entry is damaged if you did not ask for them: preprocess it again"
            )
        width = self.dtype.itemsize
        return np.frombuffer(pread(self._data, start * width, (stop - start) * width), self.dtype)

    def validate(self) -> None:
        """Read the whole index: offsets contiguous, boundaries ascending, sizes equal. Seconds per 100M documents.

        Raises:
            ValueError: names the first entry that is off.
        """
        expected = 0
        for lo in range(0, self.num_sequences, CHUNK):
            sizes = self._lengths.block(lo, lo + CHUNK).astype(np.int64) * self.dtype.itemsize
            ends = expected + np.cumsum(sizes)
            wrong = np.flatnonzero((self._offsets.block(lo, lo + CHUNK) != ends - sizes) | (sizes < 0))
            if wrong.size:
                k = lo + int(wrong[0])
                raise ValueError(
                    f"{self.index_path}: sequence {k} has offset {self._offsets[k]}, length {self._lengths[k]}; "
                    f"expected offset {int((ends - sizes)[wrong[0]])} and a length >= 0: preprocess it again"
                )
            expected = int(ends[-1])
        for lo in range(0, self.num_documents, CHUNK):
            steps = np.diff(self._boundaries.block(lo, lo + CHUNK + 1))
            if (steps < 0).any():
                k = lo + int(np.flatnonzero(steps < 0)[0])
                raise ValueError(f"{self.index_path}: document {k} ends before it begins; preprocess it again")
        size = os.fstat(self._data.fileno()).st_size
        if size != expected:
            raise ValueError(f"{self.data_path}: {size} bytes, but the index describes {expected}; copy both again")

    def fingerprint(self) -> str:
        """SHA-256 (hex) over sizes and 16 blocks of 4 KiB of each file, header included; takes milliseconds."""
        digest = hashlib.sha256()
        for path in (self.index_path, self.data_path):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb", buffering=0) as file:
                for i in range(16):
                    digest.update(pread(file, max(0, size - 4096) * i // 15, min(size, 4096)))
        return digest.hexdigest()


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear under their names only on `close`, complete and on disk.

    Use it as a context manager: an exception inside the block removes the temporary files instead. Memory stays
    bounded whatever the number of documents (lengths are spilled to a third temporary file).
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype | type | str):
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype and known.kind != "f"]
        if not codes:
            raise ValueError(f"{self.prefix}: tokens of dtype {self.dtype} cannot be stored; use an integer type")
        self._code = codes[0]
        self._bounds = np.iinfo(self.dtype)
        self._paths = {kind: Path(f"{self.prefix}.{kind}.tmp") for kind in ("bin", "idx", "lengths")}
        self._bin: IO[bytes] = self._paths["bin"].open("wb", buffering=1 << 20)
        self._spill: IO[bytes] = self._paths["lengths"].open("w+b")
        self._lengths = array("i")
        self.num_documents = self.num_tokens = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def add_document(self, ids: np.ndarray | list[int]) -> None:
        """Append one document, (length,) token ids.

        Raises:
            ValueError: an id does not fit the dtype, or the document has 2**31 tokens or more.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.dtype.kind not in "iu" or ids.min() < self._bounds.min or ids.max() > self._bounds.max):
            raise ValueError(
                f"{self.prefix}: ids {ids.min()} to {ids.max()} ({ids.dtype}) do not fit {self.dtype}; "
                "choose the dtype by best_dtype(vocab_size)"
            )
        self._bin.write(np.ascontiguousarray(ids, self.dtype).data)
        self._count(np.array([ids.size]))

    def extend(self, part: IndexedDataset) -> None:
        """Append every document of `part` (as one sequence each), a block at a time.

        Raises:
            ValueError: `part` has another dtype.
        """
        if part.dtype != self.dtype:
            raise ValueError(f"{part.prefix} holds {part.dtype}, {self.prefix} is to hold {self.dtype}; rebuild it")
        for lo in range(0, part.num_tokens, CHUNK):
            self._bin.write(part.tokens(lo, min(lo + CHUNK, part.num_tokens)).data)
        for lo in range(0, part.num_documents, CHUNK):
            hi = min(lo + CHUNK, part.num_documents)
            self._count(part.document_lengths(lo, hi))

    def _count(self, lengths: np.ndarray) -> None:
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise ValueError(f"{self.prefix}: a document of {lengths.max()} tokens is too long; split it below 2**31")
        self._lengths.extend(lengths.tolist())
        self.num_documents += lengths.size
        self.num_tokens += int(lengths.sum())
        if len(self._lengths) >= CHUNK:
            self._lengths.tofile(self._spill)
            self._lengths = array("i")

    def close(self) -> None:
        """Write the index, bring everything to the disk, and give both files their names (the .idx last)."""
        self._lengths.tofile(self._spill)
        with self._paths["idx"].open("wb") as idx:
            n = self.num_documents
            idx.write(HEADER.pack(MAGIC, 1, self._code, n, n + 1))
            end = 0
            for chunk in self._spilled():
                idx.write(chunk.data)
            for chunk in self._spilled():
                ends = end + np.cumsum(chunk, dtype=np.int64) * self.dtype.itemsize
                idx.write((ends - chunk.astype(np.int64) * self.dtype.itemsize).data)
                end = int(ends[-1])
            for lo in range(0, n + 1, CHUNK):
                idx.write(np.arange(lo, min(lo + CHUNK, n + 1), dtype="<i8").data)
            for file in (self._bin, idx):
                file.flush()
                os.fsync(file.fileno())
        self._bin.close()
        self._spill.close()
        final = {kind: Path(f"{self.prefix}.{kind}") for kind in ("bin", "idx")}
        final["idx"].unlink(missing_ok=True)  # an older index must never be seen beside the new tokens
        for kind, path in final.items():
            self._paths[kind].replace(path)
        self._paths["lengths"].unlink()

    def _spilled(self):
        """The lengths again, in chunks of int32."""
        self._spill.seek(0)
        while (chunk := np.frombuffer(self._spill.read(4 * CHUNK), "<i4")).size:
            yield chunk

    def abandon(self) -> None:
        """Close and remove the temporary files; what the names held before stays as it was."""
        self._bin.close()
        self._spill.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)
