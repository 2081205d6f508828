"""Rotary position embedding in HF's half-split order (Su et al. 2021): element i turns with element i + head_dim/2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin (T, 1, head_dim / 2) of each token's angles, in at least fp32."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position / theta^(2i / head_dim) of `positions` (T,), for activations of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim)
    angle = positions.to(wide)[:, None, None] * frequency
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """x (T, heads, head_dim), turned in at least fp32 and cast back."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin), -1).to(x.dtype)
