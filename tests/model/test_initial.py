"""Initial weights: the same bits for every rectangle, whatever the layout, and a proper normal distribution."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallama.config import ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.model.initial import RandomWeights, fill_normal
from megallama.parallel.pieces import Rect

MODEL = ModelConfig(
    hidden_size=24,
    intermediate_size=50,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=37,
    initializer_range=0.3,
)
UP = "model.layers.1.mlp.up_proj.weight"
WORD = 2**64 - 1


def normals(seed: int, rows: int, width: int) -> Tensor:
    """A whole standard normal matrix of odd or even width."""
    out = torch.empty(rows, width)
    fill_normal(out, Rect(0, rows, 0, width), width, seed, 1.0)
    return out


def element(seed: int, name: str, row: int, col: int, width: int, std: float) -> float:
    """One weight in Python integers and doubles: splitmix64's finaliser, then Box and Muller's transform."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    z = (key + row * ((width + 1) // 2) + col // 2) & WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    z ^= z >> 31
    radius = math.sqrt(-2 * math.log(((z >> 40) + 1) / 2**24))
    angle = 2 * math.pi * (z & 0xFFFFFF) / 2**24
    return std * radius * (math.sin(angle) if col % 2 else math.cos(angle))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_rectangle_equals_the_same_rectangle_of_the_whole(data: st.DataObject) -> None:
    """Also where the width is odd, where a rectangle cuts a pair of elements, and over several tiles of rows."""
    rows, width = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 900))
    r0, c0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    r1, c1 = data.draw(st.integers(r0 + 1, rows)), data.draw(st.integers(c0 + 1, width))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    part = torch.empty(r1 - r0, c1 - c0)
    fill_normal(part, Rect(r0, r1, c0, c1), width, seed, 1.0)
    assert torch.equal(part, normals(seed, rows, width)[r0:r1, c0:c1])


def test_elements_equal_the_definition_in_integers() -> None:
    source, (rows, width) = RandomWeights(MODEL, 5), canonical_shapes(MODEL)[UP]
    whole = torch.empty(rows, width)
    source.read(UP, Rect(0, rows, 0, width), whole)
    expected = [[element(5, UP, r, c, width, MODEL.initializer_range) for c in range(width)] for r in range(rows)]
    torch.testing.assert_close(whole.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_the_distribution_is_normal() -> None:
    """Moments and distribution function within about four standard errors of a million draws."""
    x = normals(12345, 1000, 1001).double().flatten()
    n = x.numel()
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    sampled = x.sort().values
    true = 0.5 * (1 + torch.erf(sampled / math.sqrt(2)))
    steps = torch.arange(n, dtype=torch.float64) / n
    assert float((true - steps).abs().max()) < 2 / math.sqrt(n)


@pytest.mark.parametrize("transform", [lambda x: x, lambda x: x.square() - 1], ids=["values", "squares"])
def test_neighbours_are_independent(transform) -> None:
    """Partners of one Box-Muller pair share a radius, and rows and pairs share a counter: neither may show."""
    x = transform(normals(99, 1000, 1000).double())

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])

    limit = 4 / math.sqrt(x.numel() / 2)
    assert abs(correlation(x[:, 0::2], x[:, 1::2])) < limit
    assert abs(correlation(x[:, :-2], x[:, 2:])) < limit
    assert abs(correlation(x[:-1], x[1:])) < limit


def test_every_tensor_and_seed_draws_its_own() -> None:
    shapes = canonical_shapes(MODEL)
    seen = []
    for seed in (0, 1):
        source = RandomWeights(MODEL, seed)
        for name, shape in shapes.items():
            if len(shape) == 2:
                out = torch.empty(shape)
                source.read(name, Rect(0, shape[0], 0, shape[1]), out)
                assert abs(float(out.std()) / MODEL.initializer_range - 1) < 0.2, name
                seen.append(tuple(out.flatten()[:8].tolist()))
    assert len(set(seen)) == len(seen)


def test_norms_start_at_one() -> None:
    out = torch.zeros(1, 5)
    RandomWeights(MODEL, 0).read("model.norm.weight", Rect(0, 1, 3, 8), out)
    assert torch.equal(out, torch.ones(1, 5))
