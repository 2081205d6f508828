"""Continuous batching: sequences that are decoded together, each entering when there is room and leaving when done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megallama.data import Tokenizer
from megallama.data.batch import Batch
from megallama.inference.cache import CachedPass, KVCache, aligned
from megallama.inference.decoding import StopWatch
from megallama.inference.sampling import Answer, Draw, Request, controls


class Row:
    """A sequence under way.

    Args:
        number: of its request.
        longest: tokens that prompt and answer may have together.
    """

    def __init__(self, number: int, request: Request, longest: int, tokenizer: Tokenizer):
        self.number, self.request = number, request
        self.room = min(request.sampling.max_new_tokens, longest - len(request.prompt))
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self._eos, self._stops = tokenizer.eos, StopWatch(tokenizer, request.sampling.stop)

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the last one, which goes through the next pass at this position."""
        return len(self.request.prompt) + len(self.ids) - 1

    @property
    def most(self) -> int:
        """Tokens that will ever be in the cache."""
        return len(self.request.prompt) + self.room - 1

    def draw(self) -> Draw:
        return Draw(self.request.sampling, self.request.seed, len(self.ids))

    def take(self, token: int, log_prob: float) -> str:
        """Add a token; how the answer ends with it, or ""."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if token == self._eos:
            return "eos"
        if self._stops(token):
            return "stop"
        return "length" if len(self.ids) == self.room else ""

    def answer(self, finish: str) -> Answer:
        return Answer(tuple(self.ids), tuple(self.log_probs), finish)


class Lane:
    """The rows of one cache. A pass gives each of them one more token and lets waiting prompts in.

    Rows lie in the first places of the cache without gaps, so that attention reads one dense part of it.

    Args:
        rows: most sequences at a time.
        prompt_tokens: most tokens of the prompts that enter in one pass (a longer prompt enters alone).
        multiple: what the tokens of a pass are padded to.
    """

    def __init__(self, cache: KVCache, rows: int, prompt_tokens: int, multiple: int):
        self.cache, self.capacity, self.prompt_tokens, self.multiple = cache, rows, prompt_tokens, multiple
        self.rows: list[Row] = []

    def admit(self, waiting: deque[Row]) -> dict[tuple[int, ...], list[int]]:
        """Let rows in; prompt -> their places in the cache. Equal prompts are computed once."""
        entering: dict[tuple[int, ...], list[int]] = {}
        tokens = 0
        while waiting and len(self.rows) < self.capacity:
            prompt = waiting[0].request.prompt
            tokens += 0 if prompt in entering else len(prompt)
            if entering and tokens > self.prompt_tokens:
                break
            entering.setdefault(prompt, []).append(len(self.rows))
            self.rows.append(waiting.popleft())
        return entering

    def next_pass(self, waiting: deque[Row], device: torch.device) -> Batch | None:
        """The next forward pass: a token of each row, then the prompts that enter; None where there is nothing to do.

        Each of `rows` wants the logits of one token, in order.
        """
        old = len(self.rows)
        entering = self.admit(waiting)
        if not self.rows:
            return None
        going = torch.tensor([row.cached for row in self.rows[:old]], dtype=torch.int64)
        prompts = sorted(entering, key=len)  # equal lengths side by side are one dense call of attention
        ends = list(accumulate(map(len, prompts), initial=old))
        wanted, stored, rows, at = list(range(len(self.rows))), [torch.arange(old)], [torch.arange(old)], [going]
        for prompt, (lo, hi) in zip(prompts, pairwise(ends), strict=True):
            for place in entering[prompt]:
                wanted[place] = hi - 1
                stored.append(torch.arange(lo, hi))
                rows.append(torch.full((hi - lo,), place))
                at.append(torch.arange(hi - lo))
        if pad := -ends[-1] % self.multiple:
            ends.append(ends[-1] + pad)
        tokens = [row.ids[-1] for row in self.rows[:old]] + [token for prompt in prompts for token in prompt]
        ids, positions, chosen, kept, places = _together(
            device,
            torch.tensor(tokens + [0] * pad),
            torch.cat([going, *(torch.arange(hi - lo) for lo, hi in pairwise(ends))]),
            torch.tensor(wanted),
            torch.cat(stored),
            self.cache.places(torch.cat(rows), torch.cat(at)),
        )
        mask = self._mask(positions[:old], aligned(int(going.max()) + 1) if old else 0)
        drawn = controls([row.draw() for row in self.rows])
        return Batch(
            tokens=ids,
            labels=ids,
            positions=positions,
            bounds=(*range(old), *ends),
            count=0,
            extras=dict(zip(drawn, _together(device, *drawn.values()), strict=True)),
            cache=CachedPass(self.cache, chosen, kept, places, mask, tuple(end - old for end in ends)),
        )

    def _mask(self, going: Tensor, tokens: int) -> Tensor:
        """(rows, 1, 1, tokens): 0 at the tokens that a row has, itself included, -inf behind them."""
        behind = torch.arange(tokens, device=going.device) > going[:, None]
        mask = torch.zeros(behind.shape, dtype=self.cache.store.dtype, device=going.device)
        return mask.masked_fill_(behind, -math.inf)[:, None, None]

    def take(self, ids: Sequence[int], log_probs: Sequence[float]) -> list[tuple[Row, str]]:
        """Give each row its token; how each goes on: (row, "" or its answer's finish). Those that end leave."""
        each = zip(self.rows, ids, log_probs, strict=True)
        result = [(row, row.take(token, log_prob)) for row, token, log_prob in each]
        for place in range(len(result) - 1, -1, -1):
            if result[place][1]:
                self._remove(place)
        return result

    def _remove(self, place: int) -> None:
        """The last row moves into the gap."""
        last = self.rows.pop()
        if place < len(self.rows):
            self.cache.move(len(self.rows), place, last.cached)
            self.rows[place] = last


def _together(device: torch.device, *parts: Tensor) -> Sequence[Tensor]:
    """Vectors of one type on `device`, sent in one piece: of small copies it is the number that costs."""
    return torch.cat(parts).to(device, non_blocking=True).split([part.numel() for part in parts])
