"""The indexed dataset: contents, errors, and that nothing half-written is ever seen."""

from __future__ import annotations

import pickle
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data import Corpus, IndexedDataset, IndexedWriter, Mixture, best_dtype
from megallama.data.indexed import HEADER


@given(documents=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=20), lo=st.integers(0, 99))
def test_round_trip_against_plain_lists(documents: list[list[int]], lo: int, tmp_path_factory: pytest.TempPathFactory):
    prefix = tmp_path_factory.mktemp("data") / "corpus"
    with IndexedWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
    dataset = IndexedDataset(prefix)
    dataset.validate()
    flat = [x for ids in documents for x in ids]
    assert [dataset.document(k).tolist() for k in range(len(dataset))] == documents
    assert dataset.document_lengths(0, len(dataset)).tolist() == list(map(len, documents))
    assert dataset.num_tokens == len(flat) and dataset.dtype == np.uint16
    lo = min(lo, len(flat))
    hi = min(lo + 7, len(flat))
    assert dataset.tokens(lo, hi).tolist() == flat[lo:hi]
    begins = [sum(map(len, documents[:k])) for k in range(len(documents))]
    assert dataset.document_starts(lo, hi).tolist() == sorted({b for b in begins if lo <= b < hi})
    for token in range(lo, hi):
        k = dataset.document_at(token)
        assert begins[k] <= token < begins[k] + len(documents[k])


def test_layout_is_the_documented_one(tmp_path: Path):
    with IndexedWriter(tmp_path / "x", best_dtype(32000)) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([])
        writer.add_document([65535])
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", 3, 0, 1)
    expected += struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65535)


def test_dtype_follows_the_vocabulary():
    assert best_dtype(65_499) == np.uint16 and best_dtype(65_500) == np.int32


def test_documents_of_several_sequences_and_trailing_modes(tmp_path: Path):
    """Other writers put several sequences into a document, and perhaps a mode byte for each sequence behind it all."""
    index = HEADER.pack(b"MMIDIDX\0\0", 1, 4, 3, 3) + struct.pack("<3i3q3q", 2, 1, 2, 0, 8, 12, 0, 2, 3) + b"\0\0\0"
    (tmp_path / "x.idx").write_bytes(index)
    np.arange(5, dtype="<i4").tofile(tmp_path / "x.bin")
    dataset = IndexedDataset(tmp_path / "x")
    dataset.validate()
    assert [dataset.document(k).tolist() for k in range(2)] == [[0, 1, 2], [3, 4]]
    with IndexedWriter(tmp_path / "y", np.int32) as writer:
        writer.extend(dataset)
    assert [IndexedDataset(tmp_path / "y").document(k).tolist() for k in range(2)] == [[0, 1, 2], [3, 4]]


def damaged(name: str, index: bytes) -> bytes:
    header = list(HEADER.unpack_from(index))
    if name == "magic":
        header[0] = b"NOTMAGIC!"
    elif name == "version":
        header[1] = 2
    elif name == "dtype":
        header[2] = 9
    elif name == "float dtype":
        header[2] = 7
    elif name == "absurd sequences":
        header[3] = 2**63
    elif name == "absurd boundaries":
        header[4] = 2**64 - 1
    elif name == "wrapping counts":
        header[3:] = [2**62, 2**61]
    return HEADER.pack(*header) + index[HEADER.size :]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", "not an indexed dataset"),
        ("version", "format version 2"),
        ("dtype", "dtype code 9"),
        ("float dtype", "dtype code 7"),
        ("absurd sequences", "9223372036854775808 sequences .* need"),
        ("absurd boundaries", "18446744073709551615 document boundaries need"),
        ("wrapping counts", "need"),
    ],
)
def test_bad_headers(make_dataset, name: str, message: str):
    path = make_dataset([5, 6]).index_path
    path.write_bytes(damaged(name, path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(str(path).removesuffix(".idx"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 33, 34, 60])
def test_truncated_index(make_dataset, keep: int):
    dataset = make_dataset([5, 6])
    dataset.index_path.write_bytes(dataset.index_path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="preprocess"):
        IndexedDataset(dataset.prefix)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (HEADER.size + 8, struct.pack("<q", 4), "first offset 4"),
        (HEADER.size + 16, struct.pack("<q", -4), "last offset -4"),
        (HEADER.size + 16, struct.pack("<q", 21), "last offset 21"),
        (HEADER.size + 16, struct.pack("<q", 2**40), "is truncated or belongs to another index"),
        (HEADER.size + 4, struct.pack("<i", -1), "last length -1"),
        (HEADER.size + 24, struct.pack("<q", 1), "boundaries run 1 … 2"),
        (HEADER.size + 40, struct.pack("<q", 3), "boundaries run 0 … 3, expected 0 … 2"),
    ],
)
def test_bad_first_and_last_entries(make_dataset, at: int, value: bytes, message: str):
    dataset = make_dataset([5, 6])
    content = bytearray(dataset.index_path.read_bytes())
    content[at : at + len(value)] = value
    dataset.index_path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(dataset.prefix)


def test_missing_and_short_files(make_dataset, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing\.idx: no such file"):
        IndexedDataset(tmp_path / "nothing")
    dataset = make_dataset([5, 6])
    dataset.data_path.write_bytes(dataset.data_path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"43 bytes, but corpus\.idx needs 44"):
        IndexedDataset(dataset.prefix)
    with pytest.raises(ValueError, match="longer when opened"):
        dataset.tokens(0, 11)
    dataset.data_path.unlink()
    with pytest.raises(ValueError, match=r"corpus\.bin: no such file"):
        IndexedDataset(dataset.prefix)


def test_a_damaged_middle_entry_is_found_by_lookup_and_by_validate(make_dataset):
    dataset = make_dataset([5, 6, 7])
    content = bytearray(dataset.index_path.read_bytes())
    content[HEADER.size + 12 + 8 : HEADER.size + 12 + 16] = struct.pack("<q", 1 << 50)
    dataset.index_path.write_bytes(content)
    reopened = IndexedDataset(dataset.prefix)  # the ends are fine, so it opens at once
    with pytest.raises(ValueError, match="document 1 begins at sequence 1 of 3"):
        reopened.document(1)
    with pytest.raises(ValueError, match="sequence 1 has offset"):
        reopened.validate()
    with pytest.raises(IndexError, match="0 to 2"):
        reopened.document(3)
    with pytest.raises(ValueError, match="tokens 17 to 19 asked of a stream of 18"):
        reopened.tokens(17, 19)


def test_ids_that_do_not_fit_and_unsuitable_dtypes(tmp_path: Path):
    with pytest.raises(ValueError, match="do not fit uint16"), IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 65536])
    with pytest.raises(ValueError, match="cannot be stored"):
        IndexedWriter(tmp_path / "x", np.float32)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_under_the_final_names(make_dataset, tmp_path: Path):
    before = make_dataset([5, 6]).document(1).tolist()
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "corpus", np.int32) as writer:
        writer.add_document([1])
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]
    assert IndexedDataset(tmp_path / "corpus").document(1).tolist() == before


def test_fingerprint_tells_content_not_place(make_dataset, tmp_path: Path):
    dataset = make_dataset([500, 600], "a")
    assert dataset.fingerprint() == make_dataset([500, 600], "b").fingerprint()
    assert dataset.fingerprint() != make_dataset([600, 500], "c").fingerprint()
    content = bytearray(dataset.data_path.read_bytes())
    content[0] ^= 1
    dataset.data_path.write_bytes(content)
    assert dataset.fingerprint() != IndexedDataset(tmp_path / "b").fingerprint()


def test_pickled_datasets_reopen(make_dataset):
    dataset = make_dataset([5, 6])
    assert pickle.loads(pickle.dumps(dataset)).document(1).tolist() == dataset.document(1).tolist()


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def sparse_dataset(prefix: Path, documents: int, length: int) -> None:
    """An index of equal documents over a .bin that is one big hole."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        step = 1 << 20
        for lo in range(0, documents, step):
            np.full(min(step, documents - lo), length, "<i4").tofile(file)
        for lo in range(0, documents, step):
            (np.arange(lo, min(lo + step, documents), dtype="<i8") * (2 * length)).tofile(file)
        for lo in range(0, documents + 1, step):
            np.arange(lo, min(lo + step, documents + 1), dtype="<i8").tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * documents * length)


def test_ten_billion_tokens_open_and_serve_like_ten_thousand(tmp_path: Path):
    """10 million documents of 1000 tokens: start-up and lookups in milliseconds, and no memory to speak of."""
    sparse_dataset(tmp_path / "large", 10_000_000, 1000)

    def start_and_read() -> tuple[float, float]:
        began = time.perf_counter()
        mixture = Mixture([Corpus(IndexedDataset(tmp_path / "large"), 4096, 0.01)], [1.0], 1234)
        opened = time.perf_counter() - began
        mixture.read(range(0, 2_000_000, 10_000))
        return opened, time.perf_counter() - began - opened

    before = resident()
    opened, served = min(start_and_read() for _ in range(3))
    grown = (resident() - before) / 2**20
    assert IndexedDataset(tmp_path / "large").num_tokens == 10_000_000_000
    assert opened < 0.1, f"opening took {opened:.3f} s"
    assert served < 5.0, f"200 samples took {served:.3f} s"
    assert grown < 16, f"resident memory grew by {grown:.0f} MB"
    began = time.perf_counter()
    IndexedDataset(tmp_path / "large").fingerprint()
    assert time.perf_counter() - began < 0.5
