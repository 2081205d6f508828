"""Generation on the training ranks: many requests, answered by the data-parallel replicas of a trainer's model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.data import Tokenizer
from megallama.data.batch import Batch
from megallama.inference.batching import Lane, Row
from megallama.inference.cache import KVCache, free_memory
from megallama.inference.sampling import Answer, Request, choose
from megallama.parallel.collectives import all_gather, all_reduce
from megallama.runtime.exchange import everyones
from megallama.runtime.mesh import Axis
from megallama.runtime.progress import Watch, unwatched
from megallama.train.scoring import shares
from megallama.train.trainer import Trainer

OnToken = Callable[[int, int], None]

CACHE_SHARE = 0.8
"""Of a GPU's free memory for keys and values: the rest is for the pass itself and its logits."""
PROMPT_TOKENS = 4096
"""Most tokens of the prompts that enter in one pass: what a forward pass of training has."""


@dataclass(frozen=True)
class NextTokens:
    """(2, n) fp64 from the logits of n rows: the tokens that `choose` chooses and their log-probabilities.

    tp rank 0 chooses, since a GPU's running sums are not the same bits on every rank; the others add nothing.
    """

    vocab: int
    tp: Axis

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits (n, ceil(vocab / tp)) -> (2, n)."""
        whole = all_gather(logits, self.tp).unflatten(0, (self.tp.size, -1)).transpose(0, 1).flatten(1)
        chosen = torch.zeros(2, len(logits), dtype=torch.float64, device=logits.device)
        if self.tp.rank == 0:
            chosen[0], chosen[1] = choose(whole[:, : self.vocab], batch.extras)
        return all_reduce(chosen, self.tp)


class Generator:
    """Answers requests with a trainer's model, whatever its layout.

    Args:
        tokenizer: whose end-of-text token ends answers, and which decodes where stop texts are given.
        rows: most sequences decoded together on a replica. A pipeline has so many micro-batches as ranks under way, and
            the rows are shared by them.
    """

    def __init__(self, trainer: Trainer, tokenizer: Tokenizer, rows: int = 64):
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1: sequences decoded together on a replica")
        self.trainer, self.tokenizer, self.rows = trainer, tokenizer, rows

    def run(
        self, requests: Sequence[Request], on_token: OnToken | None = None, watch: Watch = unwatched
    ) -> list[Answer]:
        """The answers, in the order of the requests, on every rank. Collective: all ranks pass the same requests.

        Each replica answers a run of requests, in the order in which their prompts first appear: equal prompts stand
        together, and where one replica answers them all, they are computed once. It sees its own requests' tokens and
        answers as they come.

        Args:
            on_token: told (number of the request, token). An exception must be raised on all ranks alike.
            watch: shows how many of this replica's answers are there.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary or leaves no room for a token; or logits
                are not finite.
        """
        longest, vocab = self.trainer.config.model.max_position_embeddings, self.trainer.config.model.vocab_size
        for number, request in enumerate(requests):
            _check(number, request, longest, vocab)
        waiting = deque(Row(number, requests[number], longest, self.tokenizer) for number in self._own(requests))
        found: dict[int, Answer] = {}
        fault = ""
        try:
            with watch("answers", len(waiting)) as report:
                self._answer(waiting, found, on_token, report)
        except Stuck as error:  # the other replicas must learn of it, and they are on their own until the end
            fault = str(error)
        parts = everyones((found, fault), self.trainer.mesh.dp)
        if faults := [fault for _, fault in parts if fault]:
            raise ValueError(faults[0])
        together = {number: answer for part, _ in parts for number, answer in part.items()}
        return [together[number] for number in range(len(requests))]

    def _own(self, requests: Sequence[Request]) -> list[int]:
        """Numbers of the requests that this replica answers."""
        first: dict[tuple[int, ...], int] = {}
        for number, request in enumerate(requests):
            first.setdefault(request.prompt, number)
        order = sorted(range(len(requests)), key=lambda number: first[requests[number].prompt])
        dp = self.trainer.mesh.dp
        return [order[place] for place in shares(len(order), dp.size)[dp.rank]]

    def _answer(
        self, waiting: deque[Row], found: dict[int, Answer], on_token: OnToken | None, report: Callable[[int], None]
    ) -> None:
        """Answer this replica's requests. Collective over the replica."""
        trainer, mesh = self.trainer, self.trainer.mesh
        read = NextTokens(trainer.config.model.vocab_size, mesh.tp)
        lanes = self._lanes(waiting)
        while batches := [(lane, batch) for lane in lanes if (batch := lane.next_pass(waiting, mesh.device))]:
            results = trainer.infer([batch for _, batch in batches], read)
            for (lane, _), result in zip(batches, results, strict=True):
                ids, log_probs = result.tolist()
                for row, finish in lane.take([int(token) for token in ids], log_probs):
                    if not math.isfinite(row.log_probs[-1]):
                        raise Stuck(
                            f"request {row.number}: the logits of token {len(row.ids) - 1} of the answer are not "
                            f"finite; the model's weights are damaged or its training has diverged"
                        )
                    if on_token:
                        on_token(row.number, row.ids[-1])
                    if finish:
                        found[row.number] = row.answer(finish)
                        report(1)

    def _lanes(self, waiting: deque[Row]) -> list[Lane]:
        """One lane for each micro-batch of a pass, with memory for what waits and no more."""
        trainer, mesh = self.trainer, self.trainer.mesh
        length = max((row.most for row in waiting), default=1)
        rows = self._fitting(min(self.rows, len(waiting)), length)
        parts = [len(part) for part in shares(rows, max(1, min(mesh.pp.size, rows)))]
        stages = trainer.stages.values()
        return [Lane(KVCache(stages, part, length), part, PROMPT_TOKENS, mesh.tp.size) for part in parts]

    def _fitting(self, rows: int, length: int) -> int:
        """As many of `rows` as a GPU has room for, with CACHE_SHARE of what is free. Collective over the replica.

        Raises:
            ValueError: not even one.
        """
        mesh = self.trainer.mesh
        size, free = KVCache.row_bytes(self.trainer.stages.values(), length), free_memory(mesh.device)
        if math.isinf(free):
            return rows
        most = torch.tensor(int(CACHE_SHARE * free) // size, device=mesh.device)
        for axis in (mesh.tp, mesh.pp):
            if axis.size > 1:
                dist.all_reduce(most, dist.ReduceOp.MIN, group=axis.group)
        if rows and not int(most):
            raise Stuck(
                f"keys and values of one sequence of {length} tokens need {size / 2**30:.2f} GiB, but the device has "
                f"{free / 2**30:.2f} GiB left; raise generate.tp, or ask for fewer new tokens"
            )
        return min(rows, int(most))


class Stuck(ValueError):
    """A replica cannot go on: logits that no token can be drawn from, or no memory. The others must learn of it."""


def _check(number: int, request: Request, longest: int, vocab: int) -> None:
    prompt = request.prompt
    if not prompt:
        raise ValueError(
            f"request {number} has an empty prompt; give it one token at least, such as the tokenizer's BOS"
        )
    if len(prompt) >= longest:
        raise ValueError(
            f"request {number}: its prompt of {len(prompt)} tokens leaves no room for an answer, since the model's "
            f"max_position_embeddings is {longest}; shorten it to {longest - 1} tokens"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ValueError(
            f"request {number} has ids from {min(prompt)} to {max(prompt)}, but the model's vocabulary ends at "
            f"{vocab - 1}; encode it with the model's own tokenizer"
        )
    if not -(2**63) <= request.seed < 2**63:
        raise ValueError(f"request {number} has the seed {request.seed}; seeds are numbers of 64 bits with a sign")
