"""A model's random weights as a source in memory: what every format is compared with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.formats import Source, read_whole
from megallama.config import ModelConfig
from megallama.model.canonical import block_name, canonical_shapes
from megallama.parallel.pieces import Rect, matrix

GQA = ModelConfig(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=40,
    max_position_embeddings=96,
    rms_norm_eps=1e-4,
    rope_theta=123.0,
)
"""Two queries to a K/V head, which can be cut in 8; 40 ids are padded by Megatron."""
HEADS, GROUPS, WIDTH, HIDDEN = 16, 8, 4, 64
DTYPES = [torch.float32, torch.bfloat16]


class RandomSource:
    """Normal weights, as large as `scale`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32, scale: float = 0.2):
        self.folder, self.model, self.shapes = Path("memory"), model, canonical_shapes(model)
        random = torch.Generator().manual_seed(3)
        self.tensors = {
            name: (torch.randn(shape, generator=random) * scale).to(dtype) for name, shape in self.shapes.items()
        }
        self.dtypes = dict.fromkeys(self.shapes, dtype)

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        rows = self.tensors[name].view(matrix(self.shapes[name]))
        out.copy_(rows[rect.r0 : rect.r1, rect.c0 : rect.c1])


def assert_same(source: Source, tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
    """Bit by bit, and in the same precision."""
    assert source.shapes.keys() == set(names or tensors)
    for name in source.shapes:
        found = read_whole(source, name)
        assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name]), name


def load(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def block(source: RandomSource, layer: int) -> dict[str, Tensor]:
    """Last name of a projection or norm -> its tensor."""
    prefix = block_name(layer)
    found = {name: t for name, t in source.tensors.items() if name.startswith(prefix)}
    return {name.removesuffix(".weight").split(".")[-1]: t for name, t in found.items()}


def interleave(w: Tensor, count: int) -> Tensor:
    """Half-split rotary rows of `count` heads to neighbours, by the formula."""
    return w.view(count, 2, WIDTH // 2, HIDDEN).transpose(1, 2).reshape(count * WIDTH, HIDDEN)
