"""Sample i of a run: which source, which epoch, which tokens. Everything follows from (seed, i).

A corpus' part (training or held out) is read as a ring of T tokens. An epoch cuts the ring into T // S windows of S + 1
tokens, S apart (the extra token is the last label), beginning at an offset of its own; so over the epochs every token
becomes a label, and documents are cut at different places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .indexed import IndexedDataset
from .order import Order, key

PARTS = ("train", "valid")
OFFSET_KEY = 1  # sets the key of an epoch's offset apart from the key of its order


class Corpus:
    """The training part or the held-out part of one dataset, as windows of seq_length + 1 tokens.

    The held-out part is the tail of the stream, from the document boundary nearest to the share `split`; where no
    boundary lies within half that share (a few huge documents), the cut goes through a document.

    Args:
        dataset: the tokenised corpus.
        seq_length: S, tokens a sample.
        split: share held out, in [0, 1).
        part: "train" or "valid".

    Raises:
        ValueError: the dataset is empty or the part is shorter than one sample.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, split: float = 0.0, part: str = "train"):
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown; choose one of {', '.join(PARTS)}")
        if not 0 <= split < 1:
            raise ValueError(f"data.split={split} is no share; choose 0 <= data.split < 1")
        if seq_length < 1:
            raise ValueError(f"data.seq_length={seq_length} must be at least 1")
        if dataset.num_tokens == 0:
            raise ValueError(f"source {dataset.prefix} is empty (0 tokens); remove it from data.sources")
        self.dataset, self.seq_length, self.part = dataset, seq_length, part
        cut = held_out_start(dataset, split)
        self.start, self.stop = (0, cut) if part == "train" else (cut, dataset.num_tokens)
        if self.num_tokens <= seq_length:
            raise ValueError(
                f"source {dataset.prefix}: its {part} part has {self.num_tokens} of {dataset.num_tokens} tokens, one "
                f"sample needs {seq_length + 1}; lower data.seq_length={seq_length}, change data.split={split}, "
                "or add text"
            )

    @property
    def num_tokens(self) -> int:
        """T, tokens of this part."""
        return self.stop - self.start

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self.num_tokens // self.seq_length

    def window(self, position: int, offset: int) -> tuple[tuple[int, int], ...]:
        """Where window `position` of an epoch with that `offset` lies in the dataset: one range, or two past the end.

        The ranges are half-open and together seq_length + 1 tokens long.
        """
        lo = self.start + (offset + position * self.seq_length) % self.num_tokens
        hi = lo + self.seq_length + 1
        if hi <= self.stop:
            return ((lo, hi),)
        return ((lo, self.stop), (self.start, self.start + hi - self.stop))


def held_out_start(dataset: IndexedDataset, split: float) -> int:
    """The token at which the held-out tail begins (see Corpus); O(log documents)."""
    total = dataset.num_tokens
    held_out = round(total * split)
    if held_out == 0:
        return total
    target = total - held_out
    k = dataset.document_at(target)
    nearest = min((dataset.document_start(k), dataset.document_start(k + 1)), key=lambda start: abs(start - target))
    return nearest if nearest > 0 and abs(nearest - target) <= held_out // 2 else target


class Window(NamedTuple):
    """One sample's place: `ranges` are half-open token ranges of source `source`, seq_length + 1 tokens in all."""

    source: int
    epoch: int
    ranges: tuple[tuple[int, int], ...]


class Sample(NamedTuple):
    """One sample.

    Attributes:
        tokens: int64 (seq_length + 1,); inputs are all but the last, labels all but the first.
        document_starts: ascending offsets inside the inputs, without 0, at which a document begins.
    """

    tokens: np.ndarray
    document_starts: list[int]


class Location(NamedTuple):
    """Where a sample comes from; `documents` are numbered as in the source's index."""

    source: int
    epoch: int
    ranges: tuple[tuple[int, int], ...]
    documents: tuple[int, ...]


class Mixture:
    """A weighted blend of corpora as one endless sequence of samples, the same on every rank.

    Args:
        corpora: the sources, all with the same seq_length.
        weights: share of each source among the samples, up to a common factor.
        seed: of the run.

    Raises:
        ValueError: no source, a weight that is not positive, or different sequence lengths.
    """

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], seed: int):
        if len(corpora) != len(weights):
            raise ValueError(f"{len(corpora)} sources and {len(weights)} weights; give each source one weight")
        self.corpora, self.seed = tuple(corpora), seed
        self.order = Order(weights, [len(corpus) for corpus in corpora], seed)
        lengths = sorted({corpus.seq_length for corpus in corpora})
        if len(lengths) > 1:
            raise ValueError(f"sources have different sequence lengths {lengths}; choose one data.seq_length")
        self.seq_length = lengths[0]

    def windows(self, indices: ArrayLike) -> list[Window]:
        """The places of samples `indices` (n,) in O(n), without reading any token."""
        source, epoch, position = self.order(indices)
        keys = key(self.seed, source, epoch, OFFSET_KEY)
        places = zip(source.tolist(), epoch.tolist(), position.tolist(), keys.tolist(), strict=True)
        return [Window(s, e, self.corpora[s].window(p, k % self.corpora[s].num_tokens)) for s, e, p, k in places]

    def read(self, indices: Iterable[int], with_documents: bool = True) -> list[Sample]:
        """Samples `indices`; without documents, `document_starts` stays empty and the index is not searched."""
        return [self._read(window, with_documents) for window in self.windows(np.fromiter(indices, np.int64))]

    def _read(self, window: Window, with_documents: bool) -> Sample:
        dataset = self.corpora[window.source].dataset
        tokens = np.concatenate([dataset.tokens(lo, hi) for lo, hi in window.ranges]).astype(np.int64)
        if not with_documents:
            return Sample(tokens, [])
        starts, at = [], 0
        for lo, hi in window.ranges:
            starts += (dataset.document_starts(lo, hi) - lo + at).tolist()
            at += hi - lo
        joint = window.ranges[0][1] - window.ranges[0][0]  # going round the ring never joins two documents
        return Sample(tokens, sorted({x for x in (*starts, joint) if 0 < x < self.seq_length}))

    def sample(self, i: int) -> np.ndarray:
        """Tokens of sample i, int64 (seq_length + 1,)."""
        return self.read([i], with_documents=False)[0].tokens

    def locate(self, i: int) -> Location:
        """Source, epoch, token ranges and documents of sample i."""
        (window,) = self.windows([i])
        dataset = self.corpora[window.source].dataset
        documents = [
            k
            for lo, hi in window.ranges
            for k in range(dataset.document_at(lo), dataset.document_at(hi - 1) + 1)
            if dataset.document_start(k) < dataset.document_start(k + 1)  # empty documents hold no token of it
        ]
        return Location(*window, tuple(dict.fromkeys(documents)))


def open_mixture(sources: Sequence[tuple[str, float]], seq_length: int, split: float, part: str, seed: int) -> Mixture:
    """The blend that a run's configuration describes: training and inspection both open their data here.

    Args:
        sources: (prefix, weight) of each corpus, data.sources.
        seq_length: data.seq_length.
        split: data.split.
        part: "train" or "valid".
        seed: train.seed.
    """
    corpora = [Corpus(IndexedDataset(prefix), seq_length, split, part) for prefix, _ in sources]
    return Mixture(corpora, [weight for _, weight in sources], seed)
