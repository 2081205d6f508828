"""Micro-batches: the same samples in every layout, and in the background as in the foreground."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megallama.data import Corpus, Mixture
from megallama.data.batch import IGNORE
from megallama.data.loader import CorpusLoader, Prefetch

LENGTHS = [7, 30, 1, 12, 25, 25, 3, 60, 9]


@pytest.fixture
def mixture(make_dataset) -> Mixture:
    return Mixture([Corpus(make_dataset(LENGTHS), 16)], [1.0], seed=3)


@pytest.mark.parametrize("dp", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_layout_sees_the_samples_of_the_step(mixture: Mixture, dp: int, micro: int):
    size = 24
    loader = CorpusLoader(mixture)
    rows = []
    for rank in range(dp):
        for batch in loader.micros(100, rank, dp, micro, size // dp // micro):
            assert batch.bounds == tuple(range(0, 16 * micro + 1, 16)) and batch.count == 16 * micro
            rows += batch.tokens.view(micro, 16).tolist()
            assert batch.positions.tolist() == [*range(16)] * micro
            assert batch.labels.view(micro, 16)[:, :-1].tolist() == batch.tokens.view(micro, 16)[:, 1:].tolist()
    assert rows == [mixture.sample(i)[:-1].tolist() for i in range(100, 124)]


def test_changing_the_micro_batch_size_moves_no_sample_to_another_rank(mixture: Mixture):
    loader = CorpusLoader(mixture)
    for rank in range(2):
        ones = torch.cat([batch.tokens for batch in loader.micros(0, rank, 2, 1, 4)])
        fours = torch.cat([batch.tokens for batch in loader.micros(0, rank, 2, 4, 1)])
        assert torch.equal(ones, fours)


def test_masked_documents_restart_bounds_and_positions(mixture: Mixture):
    (batch,) = CorpusLoader(mixture, mask_documents=True).micros(0, 0, 1, 8, 1)
    begins = {sum(LENGTHS[:k]) for k in range(len(LENGTHS))}  # ids are places in the stream
    expected, position = [], []
    for j, token in enumerate(batch.tokens.tolist()):
        if j % 16 == 0 or token in begins:
            expected.append(j)
        position.append(j - expected[-1])
    assert batch.bounds == (*expected, 128) and len(expected) > 8
    assert batch.positions.tolist() == position
    assert batch.count == 128  # the end of one document predicts the beginning of the next, as without masks


def test_padding_for_tensor_parallel_ranks(make_dataset):
    mixture = Mixture([Corpus(make_dataset(LENGTHS), 15)], [1.0], seed=3)
    (batch,) = CorpusLoader(mixture, multiple=4).micros(0, 0, 1, 3, 1)
    assert batch.length == 48 and batch.count == 45 and batch.bounds == (0, 15, 30, 45, 48)
    assert batch.labels[45:].tolist() == [IGNORE] * 3


def test_ids_beyond_the_vocabulary_are_named(mixture: Mixture):
    CorpusLoader(mixture, vocab_size=172).micros(0, 0, 1, 10, 1)
    with pytest.raises(ValueError, match=r"source .*corpus: sample \d+ holds ids .* model.vocab_size=100"):
        CorpusLoader(mixture, vocab_size=100).micros(0, 0, 1, 10, 1)


def ramp(step: int) -> tuple[int, int]:
    """Two steps of 4 samples, then steps of 8."""
    return (4 * step, 4) if step < 2 else (8 + 8 * (step - 2), 8)


def test_prefetched_equals_direct(mixture: Mixture):
    loader = CorpusLoader(mixture, mask_documents=True, multiple=4)
    with loader.steps(range(6), ramp, dp_rank=1, dp_size=2, micro_batch_size=2) as batches:
        got = list(batches)
    assert [len(micros) for micros in got] == [1, 1, 2, 2, 2, 2]
    for step, micros in enumerate(got):
        first, size = ramp(step)
        for ours, theirs in zip(micros, loader.micros(first, 1, 2, 2, size // 4), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.positions, theirs.positions)
            assert (ours.bounds, ours.count) == (theirs.bounds, theirs.count)


def test_a_batch_that_cannot_be_shared_out(mixture: Mixture):
    with (
        CorpusLoader(mixture).steps(range(3), lambda step: (0, 7), 0, 2, 2) as batches,
        pytest.raises(ValueError, match=r"step 0: 7 samples are no multiple of train.micro_batch_size=2 x 2"),
    ):
        next(batches)


def test_errors_reach_the_consumer_in_order_and_the_thread_ends():
    def build(item: int) -> int:
        if item == 3:
            raise OSError("disk is gone")
        return item

    running = threading.active_count()
    batches = Prefetch(build, range(10))
    got = []
    with pytest.raises(OSError, match="disk is gone"):
        for item in batches:
            got.append(item)
    assert got == [0, 1, 2]
    assert list(batches) == [] and threading.active_count() == running


def test_it_stays_at_most_depth_ahead_and_closes_at_once():
    built = []

    def endless():
        n = 0
        while True:
            yield n
            n += 1

    running = threading.active_count()
    with Prefetch(lambda n: built.append(n) or n, endless(), depth=3) as batches:
        assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
        time.sleep(0.2)
        assert len(built) <= 5 + 3 + 1
        began = time.monotonic()
    assert time.monotonic() - began < 1 and threading.active_count() == running
    assert list(batches) == []
