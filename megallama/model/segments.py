"""The element-wise work between parallel linears, as plain functions: what train.compile hands to torch.compile.

A whole block would make the compiler trace collectives and gradient buffers; these segments hold all that it can fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.model.rope import Rotation, rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim (Zhang & Sennrich 2019).

    Rounded as in HF Llama: normalised in at least fp32, cast back, then scaled.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def split_rotate(qkv: Tensor, turn: Rotation, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, (heads + 2 kv heads) * head_dim) -> turned q (T, heads, head_dim) and k, and v (T, kv heads, head_dim)."""
    q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    return rotate(q, turn), rotate(k, turn), v


def swiglu(gate_up: Tensor) -> Tensor:
    """[gate, up] (T, 2 ffn) -> silu(gate) * up (T, ffn)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Segments(NamedTuple):
    """The functions above, plain or compiled; all blocks of a model share them, so each is compiled once a shape."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    split_rotate: Callable[[Tensor, Rotation, int, int], tuple[Tensor, Tensor, Tensor]] = split_rotate
    swiglu: Callable[[Tensor], Tensor] = swiglu


PLAIN = Segments()


def compiled() -> Segments:
    """The segments through torch.compile (train.compile)."""
    return Segments(torch.compile(rms_norm), torch.compile(split_rotate), torch.compile(swiglu))
