"""Micro-batches of a step: every rank of a data-parallel replica builds the same ones, by itself."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar, cast

import torch

from .batch import Batch
from .samples import Mixture, Sample

T = TypeVar("T")
Plan = Callable[[int], tuple[int, int]]
"""step -> (first global sample, samples of the step): where a batch-size ramp lives."""


class Volume(NamedTuple):
    """How much some samples are: their tokens, padding left out, and the rows that they make in attention."""

    tokens: int
    rows: int

    @property
    def length(self) -> int:
        """Tokens of a row, on average."""
        return round(self.tokens / max(1, self.rows))


class Loader(ABC):
    """Samples as micro-batches.

    A step's samples are first_sample … first_sample + G - 1, whatever the layout. Data-parallel rank r takes the r-th
    of dp equal runs of consecutive samples and cuts it into micro-batches in order; so dp and the micro-batch size
    decide who computes a sample, never whether it belongs to the step.
    """

    @abstractmethod
    def micros(self, first_sample: int, dp_rank: int, dp_size: int, micro_batch_size: int, count: int) -> list[Batch]:
        """The `count` micro-batches of one replica for the step of dp_size * micro_batch_size * count samples.

        Raises:
            ValueError: a sample is damaged or does not fit the model.
        """

    @abstractmethod
    def volume(self, first_sample: int, count: int) -> Volume:
        """Of `count` consecutive samples; those over the end are nothing."""

    def steps(
        self, steps: Iterable[int], plan: Plan, dp_rank: int, dp_size: int, micro_batch_size: int, depth: int = 2
    ) -> Prefetch[list[Batch]]:
        """The micro-batches of `steps` one after the other, up to `depth` steps prepared ahead in the background.

        Args:
            plan: step -> (first global sample, samples of the step).

        Raises (while iterating):
            ValueError: a step's samples cannot be shared out evenly, or as `micros`.
        """

        def build(step: int) -> list[Batch]:
            first, size = plan(step)
            count, rest = divmod(size, dp_size * micro_batch_size)
            if rest or not count:
                raise ValueError(
                    f"step {step}: {size} samples are no multiple of train.micro_batch_size={micro_batch_size} x "
                    f"{dp_size} data-parallel replicas; change train.global_batch_size or train.ramp"
                )
            return self.micros(first, dp_rank, dp_size, micro_batch_size, count)

        return Prefetch(build, steps, depth)


class CorpusLoader(Loader):
    """Samples of a mixture of corpora, for pretraining.

    Args:
        mixture: the samples.
        mask_documents: attention and positions restart at each document (data.mask_documents).
        multiple: a micro-batch is padded to a multiple of this many tokens (parallel.tp).
        vocab_size: ids must lie below it (model.vocab_size); empty = not checked.
    """

    def __init__(
        self, mixture: Mixture, mask_documents: bool = False, multiple: int = 1, vocab_size: int | None = None
    ):
        self.mixture, self.mask_documents, self.multiple = mixture, mask_documents, multiple
        self.vocab_size = vocab_size

    def micros(self, first_sample: int, dp_rank: int, dp_size: int, micro_batch_size: int, count: int) -> list[Batch]:
        size = micro_batch_size * count
        first = first_sample + dp_rank * size
        samples = self.mixture.read(range(first, first + size), self.mask_documents)
        for i, sample in enumerate(samples, first):
            self._check(i, sample)
        return [self._pack(samples[m * micro_batch_size : (m + 1) * micro_batch_size]) for m in range(count)]

    def volume(self, first_sample: int, count: int) -> Volume:
        return Volume(count * self.mixture.seq_length, count)

    def _check(self, i: int, sample: Sample) -> None:
        """Without this a tensor-parallel embedding would turn foreign ids into zeros without a word."""
        low, high = int(sample.tokens.min()), int(sample.tokens.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            source = self.mixture.corpora[self.mixture.locate(i).source].dataset.prefix
            raise ValueError(
                f"source {source}: sample {i} holds ids {low} to {high}, but model.vocab_size={self.vocab_size}; "
                "was it preprocessed with another tokenizer?"
            )

    def _pack(self, samples: list[Sample]) -> Batch:
        rows = []
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens)
            rows.append((tokens[:-1], tokens[1:]))
        return Batch.pack(rows, self.multiple, [sample.document_starts for sample in samples])


class Prefetch(Generic[T]):
    """Iterates over build(item) for each item, computed by one background thread at most `depth` items ahead.

    An exception in `build` is raised where the result would have been taken. Use it as a context manager, or call
    `close`, so that the thread ends with the loop; it is a daemon, so even without that it never keeps a process up.

    Args:
        build: called in the background thread, one item after the other.
        items: what to build; may be endless.
        depth: results that may wait.
    """

    def __init__(self, build: Callable[[int], T], items: Iterable[int], depth: int = 2):
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(build, items), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, build: Callable[[int], T], items: Iterable[int]) -> None:
        try:
            for item in items:
                if not self._put(build(item), None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # it belongs to the consumer, whatever it is
            self._put(None, error)

    def _put(self, result: T | None, error: BaseException | None) -> bool:
        """Wait for room; False when the consumer has gone."""
        while not self._stop.is_set():
            try:
                self._ready.put((result, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        result, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return cast("T", result)

    def close(self) -> None:
        """Stop the thread and wait for it; what was prepared is dropped. May be called twice."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
