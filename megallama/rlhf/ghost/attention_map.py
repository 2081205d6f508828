"""Where a model looks in a dialogue: its largest attention over all heads and layers (the paper, figure 10).

One forward pass with a cache that keeps nothing but the maxima: attention is computed here in plain softmax, a few
queries at a time, so memory grows with the length of the dialogue and not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megallama.data import ChatFormat, Message
from megallama.data.batch import Batch
from megallama.data.chat import PROMPT, SYSTEM
from megallama.parallel.collectives import all_reduce
from megallama.train.trainer import Trainer

SCORES = 1 << 24
"""Most probabilities that exist at a time."""


class Peaks:
    """A Batch.cache that attends causally over one whole row, and notes where.

    Args:
        length: tokens of the row; what lies behind them is padding.
        watched: (from, to) tokens of the row.
        width: tokens that share a place of the map.

    Attributes:
        on_watched: (length,) each token's largest attention to a watched one.
        map: (places, places) the largest attention of a query in the place of the row to a key in that of the column.
    """

    def __init__(self, length: int, watched: tuple[int, int], width: int, device: torch.device):
        self.length, self.watched, self.width = length, watched, width
        self.wanted = torch.zeros(1, dtype=torch.int64, device=device)
        places = -(-length // width)
        self.on_watched = torch.zeros(length, dtype=torch.float64, device=device)
        self.map = torch.zeros(places, places, dtype=torch.float64, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, heads, head_dim), k and v (T, kv heads, head_dim) of block `layer` -> (T, heads * head_dim)."""
        total, heads, width = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.unflatten(1, (k.shape[1], -1)).to(wide) / math.sqrt(width)
        keys, values, out = k.to(wide), v.to(wide), []
        step = max(1, SCORES // (heads * total))
        for lo in range(0, total, step):
            hi = min(lo + step, total)
            scores = torch.einsum("qkgd,tkd->kgqt", grouped[lo:hi], keys[:hi])
            later = torch.arange(hi, device=q.device) > torch.arange(lo, hi, device=q.device)[:, None]
            shares = scores.masked_fill_(later, -math.inf).softmax(-1)
            out.append(torch.einsum("kgqt,tkd->qkgd", shares, values[:hi]).flatten(1))
            self._note(lo, shares.amax((0, 1)).double()[: max(0, self.length - lo)])
        return torch.cat(out).to(q.dtype)

    def _note(self, first: int, most: Tensor) -> None:
        """Take in the rows (n, T) of queries first, first + 1, …."""
        lo, hi = self.watched
        if not most.numel():
            return
        end = first + len(most)
        seen = most[:, lo:hi]
        if seen.shape[1]:
            self.on_watched[first:end] = torch.maximum(self.on_watched[first:end], seen.amax(1))
        keys, places = min(most.shape[1], self.length), len(self.map)
        columns = F.pad(most[:, :keys], (0, places * self.width - keys)).unflatten(1, (places, -1)).amax(2)
        queries = torch.arange(first, end, device=most.device)[:, None] // self.width
        self.map.scatter_reduce_(0, queries.expand_as(columns), columns, "amax")


class Attention(NamedTuple):
    """fp64 on the CPU, equal on every rank; see Peaks."""

    on_watched: Tensor
    map: Tensor


def look(trainer: Trainer, ids: Sequence[int], watched: tuple[int, int], width: int = 1) -> Attention:
    """The largest attention over all heads and layers of a model in a row of ids. Collective.

    Args:
        watched: (from, to) of the tokens to which each token's largest attention is asked for.
        width: tokens that share a place of the map.

    Raises:
        ValueError: the row is longer than the model's context.
    """
    mesh, longest = trainer.mesh, trainer.config.model.max_position_embeddings
    if len(ids) > longest:
        raise ValueError(
            f"the dialogue has {len(ids)} tokens, but the model's max_position_embeddings is {longest}; give a shorter "
            f"one, or fewer --turns"
        )
    tokens = torch.tensor([*ids, *[0] * (-len(ids) % mesh.tp.size)])
    peaks = Peaks(len(ids), watched, width, mesh.device)
    batch = Batch(tokens, tokens, torch.arange(len(tokens)), (0, len(tokens)), 0, cache=peaks)
    trainer.infer([batch], lambda logits, batch: logits[:, :1])
    for found in (peaks.on_watched, peaks.map):
        for axis in (mesh.tp, mesh.pp):
            all_reduce(found, axis, dist.ReduceOp.MAX)
    return Attention(peaks.on_watched.cpu(), peaks.map.cpu())


class Section(NamedTuple):
    """Tokens first … last - 1 of a dialogue are one message; a system message's are those of its own words alone."""

    name: str
    first: int
    last: int


def sections(form: ChatFormat, messages: Sequence[Message], instruction: str) -> tuple[list[int], list[Section]]:
    """A dialogue in ids, and its parts: the instruction (which its first message is or begins with), then every
    message as far as it goes with its marks."""
    whole = messages if messages[-1].role == "assistant" else messages[:-1]
    ids = form.dialogue(_trained(whole)).ids.tolist()
    before = PROMPT.partition("{")[0] + (SYSTEM.partition("{")[0] if messages[0].role == "system" else "")
    first, last = (_common(ids, form, text) for text in (before, before + instruction.strip()))
    found = [Section("instruction", first, last)]
    at = last
    for n, message in enumerate(whole):
        if message.role == "system":
            continue
        so_far = whole[: n + 1]
        end = len(form.prompt(so_far)) if message.role == "user" else len(form.dialogue(_trained(so_far)).ids)
        found.append(Section(message.role, at, end))
        at = end
    return ids, found


def _trained(messages: Sequence[Message]) -> list[Message]:
    return [message._replace(train=True) for message in messages]


def _common(ids: Sequence[int], form: ChatFormat, text: str) -> int:
    """How many ids at the beginning are those of `text`."""
    bos = [] if form.tokenizer.bos is None else [form.tokenizer.bos]
    pairs = zip(ids, [*bos, *form.tokenizer.encode(text)], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
