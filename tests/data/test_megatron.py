"""The indexed dataset against the implementation of record, both ways."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megallama.data import IndexedDataset, IndexedWriter

DRAW = random.Random(5)
DOCUMENTS = [[DRAW.randrange(60_000) for _ in range(DRAW.randrange(1, 50))] for _ in range(100)]


# Their builder makes arrays of tensors in a way that NumPy 2 is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's module (its import takes seconds)."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_ours_opens_there(megatron, tmp_path: Path, dtype: type):
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for ids in DOCUMENTS:
            writer.add_document(ids)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(DOCUMENTS) and theirs.index.dtype == dtype
    assert [theirs[k].tolist() for k in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_theirs_opens_here_and_the_bytes_are_equal(megatron, tmp_path: Path, dtype: type):
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for ids in DOCUMENTS:
            writer.add_document(ids)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_their_documents_of_several_sequences(megatron, tmp_path: Path):
    import torch

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    for n, ids in enumerate(DOCUMENTS):
        builder.add_item(torch.tensor(ids), 0)
        if n % 3 == 2 or n == len(DOCUMENTS) - 1:
            builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(tmp_path / "theirs")
    dataset.validate()
    joined = [[i for ids in DOCUMENTS[n : n + 3] for i in ids] for n in range(0, len(DOCUMENTS), 3)]
    assert [dataset.document(k).tolist() for k in range(len(dataset))] == joined
