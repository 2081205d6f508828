"""Megatron's indexed dataset: PREFIX.bin holds token ids back to back, PREFIX.idx says where each document begins.

Layout of the .idx, little-endian: magic (9 bytes), u64 version 1, u8 dtype code, u64 sequences, u64 document
boundaries; then i32 length[sequences], i64 byte offset[sequences], i64 boundary[boundaries] (in sequences, first 0) and
perhaps i8 mode[sequences], which is ignored. A document is a run of consecutive sequences, usually one.

Opening reads the header and the first and last entries only, so it costs the same for a thousand documents and for a
billion; each lookup checks the entries that it uses.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
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


class Index(NamedTuple):
    """The arrays of an .idx file, as views of its mapping (no page is read before it is touched)."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    boundaries: np.ndarray


def read_index(path: Path) -> Index:
    """Map an .idx file, checking the header and that every count fits the file before any array is made.

    Raises:
        ValueError: no such file, wrong magic, version or dtype code, or counts that the file cannot hold.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a source is named by its prefix, the path without .bin or .idx")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < HEADER.size:
            raise ValueError(f"{path}: {size} bytes cannot hold the {HEADER.size}-byte header; preprocess it again")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, version, code, sequences, boundaries = HEADER.unpack_from(view)
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
    at = HEADER.size
    lengths = np.frombuffer(view, "<i4", sequences, at)
    offsets = np.frombuffer(view, "<i8", sequences, at + sequences * 4)
    return Index(DTYPES[code], lengths, offsets, np.frombuffer(view, "<i8", boundaries, at + sequences * 12))


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
        self.dtype, self._lengths, self._offsets, self._boundaries = read_index(self.index_path)
        if not self.data_path.is_file():
            raise ValueError(f"{self.data_path}: no such file, but {self.index_path} is there; copy both")
        self._data = self.data_path.open("rb", buffering=0)
        self._check_ends(os.fstat(self._data.fileno()).st_size)

    def _check_ends(self, size: int) -> None:
        """First and last entries of the index against each other and against the .bin's `size` in bytes."""
        sequences, documents = len(self._lengths), len(self._boundaries) - 1
        if documents < 0 or self._boundaries[0] != 0 or self._boundaries[-1] != sequences:
            found = "none" if documents < 0 else f"{self._boundaries[0]} … {self._boundaries[-1]}"
            raise ValueError(
                f"{self.index_path}: document boundaries run {found}, expected 0 … {sequences} (its sequences); "
                "it is damaged: preprocess it again"
            )
        end = 0
        if sequences:
            first, last, length = int(self._offsets[0]), int(self._offsets[-1]), int(self._lengths[-1])
            if first != 0 or last < 0 or last % self.dtype.itemsize or length < 0 or int(self._lengths[0]) < 0:
                raise ValueError(
                    f"{self.index_path}: first offset {first}, last offset {last}, last length {length} are no places "
                    f"in a stream of {self.dtype.itemsize}-byte tokens; it is damaged: preprocess it again"
                )
            end = last + length * self.dtype.itemsize
        if end > size:
            raise ValueError(
                f"{self.data_path}: {size} bytes, but {self.index_path.name} needs {end}; "
                "it is truncated or belongs to another index: preprocess or copy both again"
            )
        self.num_tokens = end // self.dtype.itemsize

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
        """Token offset of document k, 0 <= k <= num_documents (the last one is the end of the stream)."""
        return int(self.starts(k, k + 1)[0])

    def starts(self, first: int, last: int) -> np.ndarray:
        """Token offsets of documents [first, last), last <= num_documents + 1, int64; checks the entries it reads.

        Raises:
            ValueError: an entry is damaged.
        """
        sequences, end = self._boundaries[first:last], self.num_tokens * self.dtype.itemsize
        inside = (sequences >= 0) & (sequences < self.num_sequences)
        offsets = np.where(sequences == self.num_sequences, end, -1)
        offsets[inside] = self._offsets[sequences[inside]]
        wrong = np.flatnonzero((offsets < 0) | (offsets > end) | (offsets % self.dtype.itemsize != 0))
        if wrong.size:
            raise ValueError(
                f"{self.index_path}: document {first + int(wrong[0])} begins at sequence {sequences[wrong[0]]} of "
                f"{self.num_sequences}, byte {offsets[wrong[0]]}: the entry is damaged; preprocess it again"
            )
        return offsets // self.dtype.itemsize

    def document(self, k: int) -> np.ndarray:
        """Token ids of document k, (length,) in the file's dtype.

        Raises:
            IndexError: k is not in [0, num_documents).
        """
        if not 0 <= k < self.num_documents:
            raise IndexError(f"document {k} of {self.prefix}: it has documents 0 to {self.num_documents - 1}")
        return self.tokens(self.document_start(k), self.document_start(k + 1))

    def document_at(self, token: int) -> int:
        """The document that holds token number `token` of the stream; O(log n)."""
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_starts(self, lo: int, hi: int) -> np.ndarray:
        """Token offsets in [lo, hi) at which a document begins, ascending, int64; O(log n + found)."""
        first = bisect_left(range(self.num_documents), lo, key=self.document_start)
        last = bisect_left(range(self.num_documents), hi, first, key=self.document_start)
        return np.unique(self.starts(first, last))  # an empty document begins where the next one does

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, (stop - start,) in the file's dtype.

        Read with pread rather than mapped: resident memory does not grow with what has been visited, and a file
        that shrinks while in use is an error instead of a crash.

        Raises:
            ValueError: the window is not inside the stream, or the file has become shorter.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"{self.data_path}: tokens {start} to {stop} asked of a stream of {self.num_tokens}; "
                "the index entry is damaged if you did not ask for them: preprocess it again"
            )
        blocks, at, end = [], start * self.dtype.itemsize, stop * self.dtype.itemsize
        while at < end:
            block = os.pread(self._data.fileno(), min(end - at, 1 << 30), at)
            if not block:
                raise ValueError(f"{self.data_path}: ends at byte {at}, it was longer when opened; was it rewritten?")
            blocks.append(block)
            at += len(block)
        return np.frombuffer(b"".join(blocks), self.dtype)

    def validate(self) -> None:
        """Read the whole index: offsets contiguous, boundaries ascending, sizes equal. Seconds per 100M documents.

        Raises:
            ValueError: names the first entry that is off.
        """
        expected = 0
        for lo in range(0, self.num_sequences, CHUNK):
            sizes = self._lengths[lo : lo + CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = expected + np.cumsum(sizes)
            wrong = np.flatnonzero((self._offsets[lo : lo + CHUNK] != ends - sizes) | (sizes < 0))
            if wrong.size:
                k = lo + int(wrong[0])
                raise ValueError(
                    f"{self.index_path}: sequence {k} has offset {self._offsets[k]}, length {self._lengths[k]}; "
                    f"expected offset {int((ends - sizes)[wrong[0]])} and a length >= 0: preprocess it again"
                )
            expected = int(ends[-1])
        for lo in range(0, self.num_documents, CHUNK):
            steps = np.diff(self._boundaries[lo : lo + CHUNK + 1])
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
                    digest.update(os.pread(file.fileno(), 4096, max(0, size - 4096) * i // 15))
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
            self._count(np.diff(part.starts(lo, hi + 1)))

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
