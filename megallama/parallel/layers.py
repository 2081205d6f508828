"""Tensor-parallel layers with sequence parallelism (Korthikanti et al. 2022).

Between blocks the T tokens of a micro-batch are sharded over tp: (T/tp, hidden). A column-parallel layer gathers them
and shards its outputs; a row-parallel layer takes sharded inputs and reduce-scatters tokens. Only token shards are
saved for backward; the gathered input is gathered again while dX is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megallama.parallel.collectives import all_gather, reduce_scatter, start_all_gather, start_reduce_scatter
from megallama.parallel.grads import WeightGrads
from megallama.parallel.pieces import Piece, shard, whole
from megallama.runtime.mesh import Axis


class Part(NamedTuple):
    """One canonical matrix inside a fused column-parallel weight: `rows` rows of tensor `name`.

    `copies` consecutive tp ranks hold the same shard (K/V heads where tp > num_key_value_heads).
    """

    name: str
    rows: int
    copies: int = 1

    def piece(self, cols: int, axis: Axis, at: int) -> Piece:
        held = shard(self.name, (self.rows, cols), 0, axis.rank // self.copies, axis.size // self.copies)
        copied = self.copies > 1
        return held._replace(at=(at, 0), replicas="kv" if copied else "", partial=copied)


class _Column(torch.autograd.Function):
    """y (T, out/tp) = gather(x) wᵀ.   dx (T/tp, in) = reduce_scatter(dy w).   dw = dyᵀ gather(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, axis: Axis, grads: WeightGrads) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.axis, ctx.grads = weight, axis, grads
        return all_gather(x, axis) @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weight, axis, grads = ctx.saved_tensors, ctx.weight, ctx.axis, ctx.grads
        x = x.detach()  # a product that waits for its W must not keep the graph behind x alive
        gathered = None if grads.deferred else start_all_gather(x, axis)
        dx = start_reduce_scatter(dy @ weight, axis)
        grads.product(weight, lambda: (dy, gathered.wait() if gathered else all_gather(x, axis)))
        return dx.wait(), None, None, None


class _Row(torch.autograd.Function):
    """y (T/tp, out) = reduce_scatter(x wᵀ).   dx (T, in/tp) = gather(dy) w.   dw = gather(dy)ᵀ x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, axis: Axis, grads: WeightGrads) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.axis, ctx.grads = weight, axis, grads
        return reduce_scatter(x @ weight.t(), axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weight, grads = ctx.saved_tensors, ctx.weight, ctx.grads
        x = x.detach()  # as in _Column
        dy = all_gather(dy, ctx.axis)
        dx = dy @ weight
        grads.product(weight, lambda: (dy, x))
        return dx, None, None, None


class _Embedding(torch.autograd.Function):
    """y (T/tp, hidden) = reduce_scatter(w[tokens - first], 0 outside the shard).   dw[tokens - first] += gather(dy)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, first: int, weight: nn.Parameter, axis: Axis, grads: WeightGrads) -> Tensor:
        rows = tokens - first
        outside = (rows < 0) | (rows >= weight.shape[0])
        rows = rows.remainder(weight.shape[0])  # spreads the others' tokens, whose gradient is zero, over all rows
        ctx.save_for_backward(rows, outside)
        ctx.weight, ctx.axis, ctx.grads = weight, axis, grads
        y = weight[rows]
        if axis.size > 1:
            y.masked_fill_(outside[:, None], 0)
        return reduce_scatter(y, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None, None, None]:
        rows, outside = ctx.saved_tensors
        dy = all_gather(dy, ctx.axis)
        if ctx.axis.size > 1:
            dy = dy.masked_fill(outside[:, None], 0)
        ctx.grads.add_rows(ctx.weight, rows, dy)
        return None, None, None, None, None


class ColumnLinear(nn.Module):
    """One or more canonical matrices, each split by rows over tp and fused into one weight (out/tp, in_features)."""

    def __init__(self, parts: list[Part], in_features: int, axis: Axis, grads: WeightGrads):
        super().__init__()
        self.axis, self.grads = axis, grads
        held, rows = [], 0
        for part in parts:
            held.append(part.piece(in_features, axis, rows))
            rows += -(-part.rows * part.copies // axis.size)
        self.weight = nn.Parameter(torch.zeros(rows, in_features))
        self.pieces = {"weight": held}

    def forward(self, x: Tensor) -> Tensor:
        """(T/tp, in_features) -> (T, out/tp)."""
        return _Column.apply(x, self.weight, self.axis, self.grads)


class RowLinear(nn.Module):
    """Canonical matrix `name` (out_features, in_features), split by columns over tp: weight (out_features, in/tp)."""

    def __init__(self, name: str, out_features: int, in_features: int, axis: Axis, grads: WeightGrads):
        super().__init__()
        self.axis, self.grads = axis, grads
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // axis.size))
        self.pieces = {"weight": [shard(name, (out_features, in_features), 1, axis.rank, axis.size)]}

    def forward(self, x: Tensor) -> Tensor:
        """(T, in/tp) -> (T/tp, out_features)."""
        return _Row.apply(x, self.weight, self.axis, self.grads)


class VocabEmbedding(nn.Module):
    """Token embedding, rows split over tp: weight (ceil(vocab/tp), hidden); rows beyond the vocabulary are padding.

    Args:
        name: the canonical tensor.
        tied: the last stage holds a copy; the two gradients are parts of one.
    """

    def __init__(self, name: str, vocab: int, hidden: int, axis: Axis, grads: WeightGrads, tied: bool = False):
        super().__init__()
        self.axis, self.grads = axis, grads
        rows = -(-vocab // axis.size)
        self.first = rows * axis.rank
        self.weight = nn.Parameter(torch.zeros(rows, hidden))
        self.pieces = {"weight": [vocab_piece(name, vocab, hidden, axis, tied)]}

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T/tp, hidden)."""
        return _Embedding.apply(tokens, self.first, self.weight, self.axis, self.grads)


class VocabHead(nn.Module):
    """LM head, rows split over tp like VocabEmbedding's; logits of padding rows are left to the loss to mask.

    Args:
        weight: an embedding's weight to share (tied, one stage); then the head owns no piece.
        tied: the first stage holds a copy of this weight.
    """

    def __init__(self, name: str, vocab: int, hidden: int, axis: Axis, grads: WeightGrads, tied: bool = False):
        super().__init__()
        self.axis, self.grads = axis, grads
        self.weight = nn.Parameter(torch.zeros(-(-vocab // axis.size), hidden))
        self.pieces = {"weight": [vocab_piece(name, vocab, hidden, axis, tied)]}

    def share(self, weight: nn.Parameter) -> None:
        """Use an embedding of this very stage (tied embeddings on one stage): the head then owns no piece."""
        self.weight, self.pieces = weight, {}

    def forward(self, x: Tensor) -> Tensor:
        """(T/tp, hidden) -> logits (T, ceil(vocab/tp))."""
        return _Column.apply(x, self.weight, self.axis, self.grads)

    def select(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(T/tp, hidden) -> logits (n, ceil(vocab/tp)) of the tokens at `tokens` (n,); without gradients."""
        return all_gather(x, self.axis)[tokens] @ self.weight.t()


class _GatherEqual(torch.autograd.Function):
    """y (T, 1) = gather(x), read by equal consumers on every rank.   dx (T/tp, 1) = this rank's part of dy.

    Every rank's dy is the whole gradient already: a reduce-scatter would count it tp times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.chunk(ctx.axis.size)[ctx.axis.rank], None


class ScalarHead(nn.Module):
    """One number for each token (reward models, critics): weight (1, hidden), whole on every tp rank.

    Each rank scores its own tokens and only the scores are gathered, so that a copy's gradient is a part, as a norm's.
    """

    def __init__(self, name: str, hidden: int, axis: Axis):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.zeros(1, hidden))
        self.pieces = {"weight": [whole(name, (1, hidden), "tp", partial=True)]}

    def forward(self, x: Tensor) -> Tensor:
        """(T/tp, hidden) -> (T, 1) in at least fp32, equal on all tp ranks."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return _GatherEqual.apply(x.to(wide) @ self.weight.to(wide).t(), self.axis)

    def select(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(T/tp, hidden) -> (n, 1) of the tokens at `tokens` (n,)."""
        return self(x)[tokens]


def vocab_piece(name: str, vocab: int, hidden: int, axis: Axis, tied: bool) -> Piece:
    """This tp rank's rows of a vocabulary matrix; its copy on the other end of the pipeline is a partial replica."""
    held = shard(name, (vocab, hidden), 0, axis.rank, axis.size)
    return held._replace(replicas="tied", partial=True) if tied else held
