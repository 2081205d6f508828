"""Vocabulary-parallel log-probabilities and cross-entropy: the full vocabulary is never gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.parallel.collectives import all_reduce
from megallama.runtime.mesh import Axis

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Logits worked on at a time: on a CPU the few passes over a chunk then stay in the cache."""


class _LogProbs(torch.autograd.Function):
    """log p(label) (T,) from logits (T, V/tp), which are overwritten by exp(logits - max of this shard).

    With e = exp(x - local max), global max M and Z = sum over shards of exp(local max - M) * sum(e):
    log p = x[label] - M - log Z.   dlogits = g * (onehot - softmax), written over e.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, valid: int, axis: Axis) -> Tensor:
        held = logits.shape[1]
        rows = labels - axis.rank * held
        outside = (rows < 0) | (rows >= held)
        rows = rows.masked_fill(outside, 0)
        padding = max(0, min(held, (axis.rank + 1) * held - valid))
        x = logits.detach()
        if padding:
            x[:, held - padding :] = float("-inf")
        wide = torch.promote_types(x.dtype, torch.float32)
        target = x.gather(1, rows[:, None])[:, 0].to(wide).masked_fill(outside, 0)
        top = x.amax(1).to(wide)
        if padding == held:  # a shard of nothing but padding must not make inf - inf
            top.fill_(torch.finfo(wide).min / 2)
        total = torch.empty_like(top)
        step = max(1, CHUNK_BYTES.get(x.device.type, 1 << 28) // (held * wide.itemsize))
        for lo in range(0, x.shape[0], step):
            part = x[lo : lo + step]
            e = part.sub_(top[lo : lo + step, None]).exp_() if part.dtype == wide else part.to(wide)
            if part.dtype != wide:
                part.copy_(e.sub_(top[lo : lo + step, None]).exp_())
            torch.sum(e, 1, out=total[lo : lo + step])
        peak = all_reduce(top.clone(), axis, dist.ReduceOp.MAX)
        scale = (top - peak).exp_()
        sums = all_reduce(torch.stack((total * scale, target)), axis)
        ctx.save_for_backward(x, rows, outside, scale / sums[0])
        return sums[1] - peak - sums[0].log()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        e, rows, outside, scale = ctx.saved_tensors
        g = g.to(scale.dtype)
        step = max(1, CHUNK_BYTES.get(e.device.type, 1 << 28) // (e.shape[1] * e.itemsize))
        weight = (-g * scale)[:, None]
        for lo in range(0, e.shape[0], step):
            part = e[lo : lo + step]
            part.copy_(part * weight[lo : lo + step]) if part.dtype != scale.dtype else part.mul_(
                weight[lo : lo + step]
            )
        e.scatter_add_(1, rows[:, None], g.masked_fill(outside, 0)[:, None].to(e.dtype))
        return e, None, None, None


def log_probs(logits: Tensor, labels: Tensor, vocab: int, axis: Axis) -> Tensor:
    """Log-probability of each label, in at least fp32. Consumes `logits`: their memory is reused.

    Args:
        logits: (T, ceil(vocab / tp)), this rank's shard of the vocabulary.
        labels: (T,) ids in [0, vocab); rows whose result is not used may hold any such id.
        vocab: true vocabulary size; columns beyond it are padding and get probability 0.

    Returns:
        (T,), equal on every tp rank. Differentiable once.
    """
    return _LogProbs.apply(logits, labels, vocab, axis)


def cross_entropy_sum(logits: Tensor, labels: Tensor, vocab: int, axis: Axis, ignore: int = -100) -> Tensor:
    """Sum of -log p(label) over the labels that are not `ignore`: a scalar, to be divided by the global count."""
    masked = labels == ignore
    return -log_probs(logits, labels.masked_fill(masked, 0), vocab, axis).masked_fill(masked, 0).sum()
