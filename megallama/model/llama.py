"""Llama 2 (arXiv 2307.09288: pre-RMSNorm, SwiGLU, RoPE, grouped-query attention) as pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megallama.config import SCALAR, ModelConfig
from megallama.data.batch import Batch
from megallama.model.attention import attention
from megallama.model.canonical import EMBEDDING, FINAL_NORM, HEAD, SCORE, block_name
from megallama.model.rope import Rotation, rotation
from megallama.model.segments import PLAIN, Segments
from megallama.parallel.grads import PipelineStage, WeightGrads
from megallama.parallel.layers import ColumnLinear, Part, RowLinear, ScalarHead, VocabEmbedding, VocabHead
from megallama.parallel.pieces import whole
from megallama.runtime.mesh import Axis

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> attended values: causal inside the batch's bounds, or over a cache."""


class Span(NamedTuple):
    """Blocks first:last of the model, with the embedding before them or the final norm and head behind them."""

    first: int
    last: int
    embed: bool
    head: bool


class RMSNorm(nn.Module):
    """A norm over the hidden dim. Every tp rank sees only its own tokens, so each copy's gradient is a part."""

    def __init__(self, name: str, hidden: int, eps: float, segments: Segments):
        super().__init__()
        self.eps, self.segments = eps, segments
        self.weight = nn.Parameter(torch.ones(hidden))
        self.pieces = {"weight": [whole(name, (hidden,), "tp", partial=True)]}

    def forward(self, x: Tensor) -> Tensor:
        """(T/tp, hidden) -> (T/tp, hidden)."""
        return self.segments.rms_norm(x, self.weight, self.eps)


class AttentionCore(nn.Module):
    """The rotary turn and attention itself, between the QKV and output projections."""

    def __init__(self, heads: int, kv_heads: int, segments: Segments):
        super().__init__()
        self.heads, self.kv_heads, self.segments = heads, kv_heads, segments

    def forward(self, qkv: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        """(T, (heads + 2 kv heads) * head_dim) -> (T, heads * head_dim)."""
        return attend(*self.segments.split_rotate(qkv, turn, self.heads, self.kv_heads))


class SwiGLU(nn.Module):
    """silu(gate) * up, between the two projections of the feed-forward."""

    def __init__(self, segments: Segments):
        super().__init__()
        self.segments = segments

    def forward(self, gate_up: Tensor) -> Tensor:
        """(T, 2 ffn) -> (T, ffn)."""
        return self.segments.swiglu(gate_up)


class Block(nn.Module):
    """One transformer block on one tp rank: heads / tp query heads, max(1, kv heads / tp) key/value heads.

    Args:
        recompute: none, selective (attention core) or full (the whole block) in backward.
    """

    def __init__(
        self, model: ModelConfig, layer: int, tp: Axis, grads: WeightGrads, recompute: str, segments: Segments
    ):
        super().__init__()
        d, kv, hd, ffn = model.hidden_size, model.num_key_value_heads, model.head_dim, model.intermediate_size
        copies, name = max(1, tp.size // kv), block_name(layer)
        self.recompute = recompute
        self.input_norm = RMSNorm(name + "input_layernorm.weight", d, model.rms_norm_eps, segments)
        self.qkv = ColumnLinear(
            [
                Part(name + "self_attn.q_proj.weight", d),
                Part(name + "self_attn.k_proj.weight", kv * hd, copies),
                Part(name + "self_attn.v_proj.weight", kv * hd, copies),
            ],
            d,
            tp,
            grads,
        )
        self.core = AttentionCore(model.num_attention_heads // tp.size, kv * copies // tp.size, segments)
        self.o = RowLinear(name + "self_attn.o_proj.weight", d, d, tp, grads)
        self.post_norm = RMSNorm(name + "post_attention_layernorm.weight", d, model.rms_norm_eps, segments)
        self.gate_up = ColumnLinear(
            [Part(name + "mlp.gate_proj.weight", ffn), Part(name + "mlp.up_proj.weight", ffn)], d, tp, grads
        )
        self.swiglu = SwiGLU(segments)
        self.down = RowLinear(name + "mlp.down_proj.weight", d, ffn, tp, grads)

    def forward(self, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        """(T/tp, hidden) -> (T/tp, hidden)."""
        if self.recompute == "full" and x.requires_grad:
            return _recomputed(self._forward, x, turn, attend)
        return self._forward(x, turn, attend)

    def _forward(self, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
        qkv = self.qkv(self.input_norm(x))
        if self.recompute == "selective" and qkv.requires_grad:
            attended = _recomputed(self.core, qkv, turn, attend)
        else:
            attended = self.core(qkv, turn, attend)
        x = x + self.o(attended)
        return x + self.down(self.swiglu(self.gate_up(self.post_norm(x))))


def _recomputed(run, x: Tensor, turn: Rotation, attend: Attend) -> Tensor:
    """run(x, …), keeping only its inputs for backward; there is no dropout, so no random state to restore."""
    return checkpoint(run, x, turn, attend, use_reentrant=False, preserve_rng_state=False)


class Stage(PipelineStage):
    """One pipeline stage of the model on one tp rank.

    Args:
        recompute: as Block's.
        segments: the element-wise functions, plain or compiled.
    """

    def __init__(self, model: ModelConfig, span: Span, tp: Axis, recompute: str = "none", segments: Segments = PLAIN):
        super().__init__()
        self.model, self.span, self.tp = model, span, tp
        self.grads = WeightGrads()
        vocab, d, tie = model.vocab_size, model.hidden_size, model.tied
        split = tie and not (span.embed and span.head)
        self.embed = VocabEmbedding(EMBEDDING, vocab, d, tp, self.grads, split) if span.embed else None
        self.blocks = nn.ModuleList(
            Block(model, n, tp, self.grads, recompute, segments) for n in range(span.first, span.last)
        )
        self.norm = RMSNorm(FINAL_NORM, d, model.rms_norm_eps, segments) if span.head else None
        self.head: VocabHead | ScalarHead | None = None
        if span.head and model.head == SCALAR:
            self.head = ScalarHead(SCORE, d, tp)
        elif span.head:
            self.head = VocabHead(EMBEDDING if tie else HEAD, vocab, d, tp, self.grads, split)
            if tie and self.embed:
                self.head.share(self.embed.weight)

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        """Hidden states (T/tp, hidden), or None on the first stage -> hidden states; on the last stage logits
        (T, vocab/tp), those of the cache's wanted tokens (n, vocab/tp), or a scalar head's values (T, 1)."""
        if self.embed is not None:
            x = self.embed(batch.tokens)
        assert x is not None, "only the first stage starts from tokens"
        turn = rotation(batch.positions, self.model.head_dim, self.model.rope_theta, x.dtype)
        cache = batch.cache
        for number, block in enumerate(self.blocks, self.span.first):
            attend = partial(attention, bounds=batch.bounds) if cache is None else partial(cache.attend, number)
            x = block(x, turn, attend)
        if self.norm is not None and self.head is not None:
            x = self.norm(x)
            x = self.head(x) if cache is None else self.head.select(x, cache.wanted)
        return x

    def units(self) -> list[nn.Module]:
        return [unit for unit in (self.embed, *self.blocks, self.norm, self.head) if unit is not None]


def stage_spans(layers: tuple[int, ...]) -> list[Span]:
    """The spans of stages that hold `layers` blocks each."""
    ends = [sum(layers[: n + 1]) for n in range(len(layers))]
    return [
        Span(end - size, end, n == 0, n == len(layers) - 1)
        for n, (size, end) in enumerate(zip(layers, ends, strict=True))
    ]
