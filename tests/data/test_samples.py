"""Samples against a naive reading of the same corpus."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data import Corpus, IndexedDataset, IndexedWriter, Mixture, open_mixture

LENGTHS = [7, 30, 1, 0, 12, 25, 25, 3, 60, 9]  # 172 tokens


def test_samples_of_one_source_against_lists(make_dataset):
    """Each epoch: every window of the shifted ring once; labels cover every token but a remainder below seq_length."""
    corpus = Corpus(make_dataset(LENGTHS), seq_length=8)
    mixture = Mixture([corpus], [1.0], seed=3)
    n = len(corpus)
    assert n == 172 // 8
    orders, offsets = set(), set()
    for epoch in range(4):
        samples = [mixture.sample(i).tolist() for i in range(epoch * n, (epoch + 1) * n)]
        # The token ids are places in the stream, so the windows can be recognised.
        offset = min(s[0] % 172 for s in samples if s[0] < 8) if any(s[0] < 8 for s in samples) else None
        for sample in samples:
            assert sample == [(sample[0] + j) % 172 for j in range(9)]
        labels = Counter(x for sample in samples for x in sample[1:])
        assert max(labels.values()) == 1 and len(labels) == n * 8
        orders.add(tuple(s[0] for s in samples))
        offsets.add(offset)
    assert len(orders) == 4 and len(offsets) > 1


def test_resume_state_is_one_integer(make_dataset):
    mixture = Mixture([Corpus(make_dataset(LENGTHS), 8)], [1.0], seed=3)
    again = Mixture([Corpus(IndexedDataset(mixture.corpora[0].dataset.prefix), 8)], [1.0], seed=3)
    for i in (0, 5, 100, 4321):
        assert np.array_equal(mixture.sample(i), again.sample(i))
    assert not np.array_equal(mixture.sample(0), Mixture(mixture.corpora, [1.0], seed=4).sample(0))


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("samples") / "corpus"
    with IndexedWriter(prefix, np.int32) as writer:
        for length in LENGTHS:
            writer.add_document(np.arange(length) + writer.num_tokens)
    return IndexedDataset(prefix)


@given(seq_length=st.integers(1, 100), i=st.integers(0, 10_000), seed=st.integers(0, 2**40))
def test_documents_of_a_sample(shared_dataset: IndexedDataset, seq_length: int, i: int, seed: int):
    """locate and document_starts agree with a walk over the documents."""
    mixture = Mixture([Corpus(shared_dataset, seq_length)], [1.0], seed)
    begins = np.cumsum([0, *LENGTHS])
    owner = [k for k, length in enumerate(LENGTHS) for _ in range(length)]
    (sample,) = mixture.read([i])
    tokens = sample.tokens.tolist()
    place = mixture.locate(i)
    assert [x for lo, hi in place.ranges for x in range(lo, hi)] == tokens
    assert list(place.documents) == list(dict.fromkeys(owner[x] for x in tokens))
    assert sample.document_starts == [j for j in range(1, seq_length) if tokens[j] in begins]
    assert place.epoch == i // (172 // seq_length)


@pytest.mark.parametrize("split", [0.05, 0.1, 0.3, 0.5])
def test_held_out_tail_is_cut_at_a_document(make_dataset, split: float):
    dataset = make_dataset(LENGTHS * 10)
    train, valid = (Corpus(dataset, 8, split, part) for part in ("train", "valid"))
    assert (train.start, train.stop, valid.stop) == (0, valid.start, dataset.num_tokens)
    assert valid.start in np.cumsum(LENGTHS * 10)
    assert abs(valid.num_tokens / dataset.num_tokens - split) <= 0.5 * split
    seen = {name: set() for name in ("train", "valid")}
    for corpus in (train, valid):
        mixture = Mixture([corpus], [1.0], seed=1)
        for i in range(3 * len(corpus)):
            seen[corpus.part] |= set(mixture.sample(i).tolist())
    assert not seen["train"] & seen["valid"]


def test_one_huge_document_is_split_inside(make_dataset):
    dataset = make_dataset([1000])
    assert Corpus(dataset, 8, 0.1, "train").stop == Corpus(dataset, 8, 0.1, "valid").start == 900


def test_no_split_leaves_nothing_held_out(make_dataset):
    dataset = make_dataset(LENGTHS)
    assert Corpus(dataset, 8, 0.0).stop == 172
    with pytest.raises(ValueError, match="its valid part has 0 of 172 tokens"):
        Corpus(dataset, 8, 0.0, "valid")


def test_sources_keep_their_own_order_in_a_blend(make_dataset):
    """Sources of a mixture give the samples that they give alone, with the key of their number."""
    a, b = Corpus(make_dataset(LENGTHS, "a"), 8), Corpus(make_dataset([100, 200], "b"), 8)
    mixture = Mixture([a, b], [0.25, 0.75], seed=9)
    alone = Mixture([a], [1.0], seed=9)
    places = [mixture.locate(i) for i in range(400)]
    from_a = [mixture.sample(i).tolist() for i in range(400) if places[i].source == 0]
    assert len(from_a) == 100
    assert from_a == [alone.sample(i).tolist() for i in range(100)]


def test_open_mixture_is_what_it_says(make_dataset):
    a, b = make_dataset(LENGTHS, "a"), make_dataset([100, 200], "b")
    by_hand = Mixture([Corpus(a, 8, 0.1), Corpus(b, 8, 0.1)], [1.0, 2.0], 7)
    opened = open_mixture([(a.prefix, 1.0), (b.prefix, 2.0)], 8, 0.1, "train", 7)
    assert all(np.array_equal(by_hand.sample(i), opened.sample(i)) for i in range(50))


def test_errors(make_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"empty \(0 tokens\)"):
        Corpus(make_dataset([], "none"), 8)
    with pytest.raises(ValueError, match=r"train part has 8 of 8 tokens, one sample needs 9; lower data.seq_length=8"):
        Corpus(make_dataset([8], "short"), 8)
    assert len(Corpus(make_dataset([9], "enough"), 8)) == 1
    dataset = make_dataset(LENGTHS, "good")
    with pytest.raises(ValueError, match=r"data.split=1.0"):
        Corpus(dataset, 8, 1.0)
    with pytest.raises(ValueError, match="train, valid"):
        Corpus(dataset, 8, 0.1, "test")
    with pytest.raises(ValueError, match=r"data.seq_length=0"):
        Corpus(dataset, 0)
    with pytest.raises(ValueError, match="weight 0"):
        Mixture([Corpus(dataset, 8)], [0], 1)
    with pytest.raises(ValueError, match="1 sources and 2 weights"):
        Mixture([Corpus(dataset, 8)], [1, 2], 1)
    with pytest.raises(ValueError, match=r"\[4, 8\]"):
        Mixture([Corpus(dataset, 8), Corpus(dataset, 4)], [1, 2], 1)
    with pytest.raises(ValueError, match=r"data.sources is empty"):
        open_mixture([], 8, 0.1, "train", 1)
