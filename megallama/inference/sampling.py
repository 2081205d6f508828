"""Sampling: what a user may ask of it, and one step of it for many sequences at once.

A token is a function of the logits, its request's seed and its number in the answer: one uniform number is hashed from
the two and looked up in the distribution, ids in ascending order. So an answer does not depend on what runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.data import key

BLOCK = 64
"""Ids whose sum is taken at once: a token is looked for among the blocks first, then inside one."""

WIDTH = 256
"""Most probable tokens looked at first for top-k and top-p; more only where they do not suffice."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen.

    top-k comes first, and top_p is a share of what it leaves. Of equally probable tokens, smaller ids count as more
    probable.

    Args:
        max_new_tokens: most tokens of the answer.
        temperature: divides the logits; 0 = the most probable token.
        top_k: choose among so many most probable tokens; 0 = all.
        top_p: choose among the fewest most probable tokens whose probabilities reach this sum.
        stop: texts that end the answer where one appears.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (the most probable token) or a positive number"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or a positive number"),
            "top_p": (0 < self.top_p <= 1, "greater than 0 and at most 1 (all tokens)"),
            "stop": ("" not in self.stop, "texts that are not empty"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise ValueError(f"sampling: {name}={getattr(self, name)!r} must be {wanted}")


class Request(NamedTuple):
    """A prompt to answer.

    Attributes:
        prompt: its ids.
        seed: equal seeds, prompts and weights give equal answers, whatever runs beside them.
    """

    prompt: tuple[int, ...]
    seed: int
    sampling: Sampling = Sampling()


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
        ids: new tokens; the end-of-text token included if it came.
        log_probs: of each of them under softmax(logits / temperature), before top-k and top-p (temperature 0: at 1).
        finish: eos, stop (one of the stop texts appeared) or length (max_new_tokens, or the model's longest sequence).
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: str


class Draw(NamedTuple):
    """One row's next token: its sampling, its request's seed, and its number in the answer."""

    sampling: Sampling
    seed: int
    number: int


def controls(draws: Sequence[Draw]) -> dict[str, Tensor]:
    """What `choose` reads of R rows: fp64 (R,) each."""
    seeds, numbers = (np.array(values, np.int64) for values in ([d.seed for d in draws], [d.number for d in draws]))
    uniform = (key(seeds, numbers) >> np.uint64(11)) * 2.0**-53
    return {
        "temperature": torch.tensor([d.sampling.temperature for d in draws], dtype=torch.float64),
        "top_k": torch.tensor([d.sampling.top_k for d in draws], dtype=torch.float64),
        "top_p": torch.tensor([d.sampling.top_p for d in draws], dtype=torch.float64),
        "uniform": torch.from_numpy(uniform),
    }


def choose(logits: Tensor, controls: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The next token of each row. Consumes `logits`: their memory is reused.

    Args:
        logits: (R, V), whole rows.
        controls: of the rows.

    Returns:
        ids (R,) and their log-probabilities (R,), in at least fp32; nan where a row's logits are not finite.
    """
    temperature, top_k, top_p, uniform = (controls[name] for name in ("temperature", "top_k", "top_p", "uniform"))
    low, x = logits.amin(1), logits.to(torch.promote_types(logits.dtype, torch.float32))
    if short := -x.shape[1] % BLOCK:
        x = F.pad(x, (0, short), value=-math.inf)
    ids = _largest(x.unflatten(1, (-1, BLOCK)))
    rows = torch.arange(len(ids), device=ids.device)
    top = x[rows, ids]
    finite = top.isfinite() & low.isfinite()
    scale = torch.where(temperature > 0, temperature, 1).to(x.dtype).clamp_(min=torch.finfo(x.dtype).tiny)
    # Relative to the largest, so that no temperature overflows.
    weights = x.sub_(top[:, None]).div_(scale[:, None]).exp_()
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(2)
    random = temperature > 0
    narrow = random & ((top_k > 0) | (top_p < 1))
    if bool((random & ~narrow).any()):
        ids = torch.where(random, _draw(blocks, sums, uniform), ids)
    if bool(narrow.any()):
        few = narrow.nonzero()[:, 0]
        ids[few] = _draw_narrow(weights[few], top_k[few].long(), top_p[few], uniform[few])
    log_probs = weights[rows, ids].log() - sums.sum(1).log()
    return ids, log_probs.masked_fill(~finite, math.nan)


def _largest(blocks: Tensor) -> Tensor:
    """(R, blocks, BLOCK) -> (R,) the smallest id of the largest value."""
    block = blocks.amax(2).argmax(1)
    inside = blocks[torch.arange(len(block), device=block.device), block].argmax(1)
    return block * BLOCK + inside


def _below(share: Tensor) -> Tensor:
    """Shares that rounding has brought to 1 are brought below it, so that they fall on a token with a weight."""
    return share.clamp(max=1 - 2.0**-53)


def _draw(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """The id at which the running sum of the weights (R, blocks, BLOCK) passes `uniform` of the whole."""
    ends = sums.double().cumsum(1)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=sums.shape[1] - 1)
    size = sums.double().gather(1, block)
    share = _below((target - ends.gather(1, block) + size) / size).clamp_(min=0)
    inner = weights[torch.arange(len(block), device=block.device), block[:, 0]].double().cumsum(1)
    inside = torch.searchsorted(inner, share * inner[:, -1:], right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + inside)[:, 0]


def _draw_narrow(weights: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """As `_draw`, among each row's most probable tokens alone."""
    vocab = weights.shape[1]
    limit = torch.where(top_k > 0, top_k, vocab)[:, None].clamp(max=vocab)
    total, width = weights.sum(1, dtype=torch.float64)[:, None], min(WIDTH, vocab)
    while True:
        largest, ids = weights.topk(width, 1)
        ends = largest.double().cumsum(1)
        mass = torch.where(limit < vocab, ends.gather(1, limit.clamp(max=width) - 1), total)
        target = top_p[:, None] * mass
        count = torch.minimum((ends < target).sum(1, keepdim=True) + 1, limit)
        enough = (limit <= width) | ((limit == vocab) & (ends[:, -1:] >= target))
        # topk breaks ties as it likes: all tokens that tie with the last one kept must be among those looked at.
        whole = largest.gather(1, count.clamp(max=width) - 1) > largest[:, -1:]
        if width == vocab or bool((enough & whole).all()):
            break
        width = min(8 * width, vocab)
    ids, by_id = ids.sort(1)
    ranked, by_weight = largest.gather(1, by_id).sort(stable=True, dim=1, descending=True)  # ties now by smaller id
    ranked = ranked.masked_fill(torch.arange(width, device=ids.device) >= count, 0)
    kept = torch.zeros_like(ranked).scatter_(1, by_weight, ranked)
    ends = kept.double().cumsum(1)
    place = torch.searchsorted(ends, _below(uniform)[:, None] * ends[:, -1:], right=True).clamp_(max=width - 1)
    return ids.gather(1, place)[:, 0]
