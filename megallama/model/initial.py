"""Initial weights that do not depend on the layout: each element is a hash of (seed, tensor name, row, column).

A rank generates just its own rectangles, and every layout starts from the same bits. Integer hashing runs on the CPU,
where its results are the same on every instruction set.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megallama.config import ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Rect, matrix

# splitmix64's finaliser, as signed 64-bit words: (right shift, multiplier)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_TILE = 1 << 16


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser in place; a mask turns PyTorch's arithmetic shift into a logical one."""
    for shift, factor in _ROUNDS:
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x


def fill_normal(out: Tensor, rect: Rect, width: int, key: int, std: float) -> None:
    """out (height, width of rect) = N(0, std²), rectangle `rect` of a tensor whose rows have `width` elements.

    Elements 2p and 2p + 1 of a row share one hash, 24 + 24 of whose bits become the uniform pair of a Box-Muller
    transform. The angle's cosine and sine are the two normals.
    """
    lo, hi = rect.c0 // 2, -(-rect.c1 // 2)
    pairs, half = torch.arange(lo, hi), -(-width // 2)
    step = max(1, _TILE // (hi - lo))
    for r in range(rect.r0, rect.r1, step):
        end = min(r + step, rect.r1)
        word = _mix((torch.arange(r, end) * half + key)[:, None] + pairs)
        radius = ((word >> 40) & 0xFFFFFF).float().add_(1).mul_(2.0**-24).log_().mul_(-2 * std * std).sqrt_()
        angle = (word & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
        normals = torch.stack((angle.cos() * radius, angle.sin_() * radius), -1).view(end - r, -1)
        out[r - rect.r0 : end - rect.r0] = normals[:, rect.c0 - 2 * lo : rect.c1 - 2 * lo]


class RandomWeights:
    """A source of canonical weights: N(0, initializer_range²) for matrices (as HF Llama), 1 for norms."""

    def __init__(self, model: ModelConfig, seed: int):
        self.std, self.seed, self.shapes = model.initializer_range, seed, canonical_shapes(model)

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width)."""
        shape = self.shapes[name]
        if len(shape) == 1:
            out.fill_(1)
        elif out.device.type == "cpu":
            fill_normal(out, rect, matrix(shape)[1], _key(self.seed, name), self.std)
        else:
            host = torch.empty(out.shape)
            self.read(name, rect, host)
            out.copy_(host)
