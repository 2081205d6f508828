"""What PPO's two models minimise (Schulman et al. 2017), over the answer tokens: those whose label is not IGNORE.

All are sums, which the trainer divides by the global count of answer tokens. The policy's functions are for logits
sharded over the vocabulary, (T, ceil(vocab / tp)), and consume them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.data.batch import IGNORE, Batch
from megallama.parallel.collectives import all_reduce
from megallama.parallel.loss import CHUNK_BYTES, log_probs
from megallama.runtime.mesh import Axis


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probability of each label at the sampling temperature, 0 where there is none: (T,), equal on all tp ranks.

    Old log-probabilities are read with this from the model that sampled, so that the first ratio of PolicyLoss, which
    goes the same way, is exactly 1. Logits are divided by the temperature in at least fp32.
    """

    vocab: int
    tp: Axis
    temperature: float = 1.0

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return _label_log_probs(_tempered(logits, self.temperature), batch.labels, self.vocab, self.tp)


@dataclass(frozen=True)
class PolicyLoss:
    """Sum over answer tokens of max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), ratio = pi / pi_old.

    Reads `batch.extras["old_log_probs"]` and `["advantages"]`, (T,) each. Metrics, sums over answer tokens:
        ratio.
        clip_fraction: tokens whose loss is the clamped one, so that no gradient comes from them.
        approx_kl: (ratio - 1) - log ratio, whose expectation over pi_old is KL(pi_old || pi); never negative.
        entropy: of the model's distribution at the temperature, exact and without gradient. It reads all logits once
            more, which takes about 1.5 times as long as the log-probabilities' forward pass, and reduces twice over tp.
    """

    vocab: int
    tp: Axis
    clip: float = 0.2
    temperature: float = 1.0

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        masked = batch.labels == IGNORE
        logits = _tempered(logits, self.temperature)
        spread = entropy(logits, self.vocab, self.tp)  # before the log-probabilities take the logits' memory
        new = _label_log_probs(logits, batch.labels, self.vocab, self.tp)
        change = new - batch.extras["old_log_probs"].to(new.dtype)
        ratio = change.exp()
        advantages = batch.extras["advantages"].to(new.dtype)
        free, clamped = -advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        loss = torch.maximum(free, clamped).masked_fill(masked, 0).sum()
        change = change.detach()
        metrics = {
            "ratio": ratio.detach(),
            "clip_fraction": (clamped > free).to(new.dtype),
            "approx_kl": change.expm1() - change,
            "entropy": spread,
        }
        return loss, {name: x.masked_fill(masked, 0).sum() for name, x in metrics.items()}


@dataclass(frozen=True)
class ValueLoss:
    """Sum over answer tokens of max((v - R)², (clamp(v, v_old - clip, v_old + clip) - R)²) / 2, of values v (T, 1).

    An infinite clip is the plain squared error. Reads `batch.extras["old_values"]` and `["returns"]`, (T,) each.
    Metrics, sums over answer tokens: value_clip_fraction, tokens whose loss is the clamped one, and value_mean,
    return_mean, return_square and value_error = (v - R)², of which `explained_variance` makes one number.
    """

    clip: float = 0.2

    def __call__(self, values: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        masked = batch.labels == IGNORE
        value = values[:, 0].to(torch.promote_types(values.dtype, torch.float32))
        old, returns = (batch.extras[name].to(value.dtype) for name in ("old_values", "returns"))
        free = (value - returns).square()
        clamped = (value.clamp(old - self.clip, old + self.clip) - returns).square()
        loss = 0.5 * torch.maximum(free, clamped).masked_fill(masked, 0).sum()
        metrics = {
            "value_clip_fraction": (clamped > free).to(value.dtype),
            "value_mean": value.detach(),
            "value_error": free.detach(),
            "return_mean": returns,
            "return_square": returns.square(),
        }
        return loss, {name: x.masked_fill(masked, 0).sum() for name, x in metrics.items()}


def explained_variance(means: Mapping[str, float]) -> float:
    """1 - Var(R - v) / Var(R) from ValueLoss's metrics, divided by the count: 1 is a perfect critic, 0 a constant one.

    nan where all returns are equal.
    """
    variance = means["return_square"] - means["return_mean"] ** 2
    error = means["value_error"] - (means["return_mean"] - means["value_mean"]) ** 2
    return 1 - error / variance if variance > 0 else math.nan


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in at least fp32 as the sampler divides; in their own memory where that is theirs."""
    return logits if temperature == 1 else logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _label_log_probs(logits: Tensor, labels: Tensor, vocab: int, tp: Axis) -> Tensor:
    masked = labels == IGNORE
    return log_probs(logits, labels.masked_fill(masked, 0), vocab, tp).masked_fill(masked, 0)


@torch.no_grad()
def entropy(logits: Tensor, vocab: int, axis: Axis) -> Tensor:
    """Entropy in nats of softmax(logits) for each token: (T,) in at least fp32, equal on all tp ranks.

    With y = x - max of this shard, M the largest of those maxima, s = max of this shard - M:
    Z = sum over shards of exp(s) * sum(exp(y)),   H = log Z - sum over shards of exp(s) * sum(exp(y) * (y + s)) / Z.
    Logits (T, ceil(vocab / tp)) stay as they are and are widened a chunk at a time; padded columns are left out.
    """
    held = logits.shape[1]
    x = logits[:, : max(0, min(held, vocab - axis.rank * held))]
    wide = torch.promote_types(x.dtype, torch.float32)
    # A shard of nothing but padding stays at this maximum: then exp(s) is 0, and no inf - inf comes up.
    top = torch.full((x.shape[0],), torch.finfo(wide).min / 2, dtype=wide, device=x.device)
    total, moment = torch.zeros_like(top), torch.zeros_like(top)
    step = max(1, CHUNK_BYTES.get(x.device.type, 1 << 28) // (held * wide.itemsize))
    for lo in range(0, x.shape[0] if x.shape[1] else 0, step):
        rows = slice(lo, lo + step)
        y = x[rows].to(wide)
        y = y - torch.amax(y, 1, out=top[rows])[:, None]
        e = y.exp()
        torch.sum(e, 1, out=total[rows])
        torch.sum(e.mul_(y), 1, out=moment[rows])
    shift = top - all_reduce(top.clone(), axis, dist.ReduceOp.MAX)
    sums = all_reduce(shift.exp() * torch.stack((total, moment + total * shift)), axis)
    return sums[0].log() - sums[1] / sums[0]
