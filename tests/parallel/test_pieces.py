"""Rectangles: cutting, finding and sharding them, against counting single elements."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.model.canonical import canonical_shapes
from megallama.optim import Zero1
from megallama.parallel.pieces import Index, Piece, Rect, Slot, cut, matrix, overlapping, pieces, shard, spans
from megallama.runtime.mesh import sketch
from megallama.train.trainer import build_stages

OWNER = {"": True, "tp": True, "kv": False, "tied": True}


@st.composite
def rects(draw, rows: int = 9, cols: int = 9) -> Rect:
    """A rectangle of one element at least inside a (rows, cols) tensor."""
    r0, c0 = draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))
    return Rect(r0, draw(st.integers(r0 + 1, rows)), c0, draw(st.integers(c0 + 1, cols)))


@st.composite
def tilings(draw, rows: int, cols: int) -> list[Rect]:
    """A (rows, cols) tensor cut by random rows, and each band by random columns."""
    tiles = []
    for r0, r1 in _between(draw(st.sets(st.integers(1, rows))), rows):
        for c0, c1 in _between(draw(st.sets(st.integers(1, cols))), cols):
            tiles.append(Rect(r0, r1, c0, c1))
    return tiles


def _between(cuts: set[int], end: int) -> list[tuple[int, int]]:
    edges = sorted({0, end, *cuts})
    return list(pairwise(edges))


def elements(rect: Rect) -> set[tuple[int, int]]:
    return {(r, c) for r in range(rect.r0, rect.r1) for c in range(rect.c0, rect.c1)}


@settings(deadline=None)
@given(rects(), rects())
def test_meet_is_the_common_elements(a, b):
    both = a.meet(b)
    assert (elements(both) if both else set()) == elements(a) & elements(b)
    assert both == b.meet(a)
    assert a.area == len(elements(a)) == a.height * a.width


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_overlapping_finds_two_that_share_an_element(data):
    """Among random rectangles, and among the tiles of a tensor with one more or one moved."""
    many = data.draw(st.lists(rects(), max_size=6))
    tiles = data.draw(tilings(9, 9))
    moved = data.draw(st.integers(0, len(tiles) - 1))
    for held in (many, tiles, [*tiles[:moved], *tiles[moved + 1 :], data.draw(rects())]):
        found = overlapping(data.draw(st.permutations(held)))
        total = sum(len(elements(rect)) for rect in held)
        if len(set().union(*map(elements, held))) == total:
            assert found is None
        else:
            assert found is not None and set(found) <= set(held) and elements(found[0]) & elements(found[1])


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_spans_are_the_elements_in_row_major_order(lo, size, cols):
    found = list(spans(lo, lo + size, cols))
    flat = [r * cols + c for rect in found for r in range(rect.r0, rect.r1) for c in range(rect.c0, rect.c1)]
    assert flat == list(range(lo, lo + size))
    assert len(found) <= 3
    assert all(rect.c0 >= 0 and rect.c1 <= cols for rect in found)


@settings(deadline=None)
@given(st.data())
def test_slots_of_a_shard_view_their_canonical_elements(data):
    """A parameter whose left part is cut into pieces of two tensors, in flat memory from `lo` to `hi`."""
    rows, cols, padding = 6, 5, data.draw(st.integers(0, 2))
    tensors = {name: torch.arange(200).view(20, 10) + base for name, base in (("a", 0), ("b", 1000))}
    parameter, held = torch.full((rows, cols + padding), -1), []
    for tile in data.draw(tilings(rows, cols)):
        name = data.draw(st.sampled_from("ab"))
        r0, c0 = data.draw(st.integers(0, 20 - tile.height)), data.draw(st.integers(0, 10 - tile.width))
        rect = Rect(r0, r0 + tile.height, c0, c0 + tile.width)
        held.append(Piece(name, (20, 10), rect, (tile.r0, tile.c0), data.draw(st.sampled_from(list(OWNER)))))
        window = tensors[name][rect.r0 : rect.r1, rect.c0 : rect.c1]
        parameter[tile.r0 : tile.r1, tile.c0 : tile.c1] = window
        assert held[-1].local == tile
    lo = data.draw(st.integers(0, parameter.numel()))
    hi = data.draw(st.integers(lo, parameter.numel()))
    flat, seen = parameter.flatten()[lo:hi], torch.zeros(hi - lo, dtype=torch.int64)
    for window in spans(lo, hi, cols + padding):
        start = window.r0 * (cols + padding) + window.c0 - lo
        for slot in cut(held, cols + padding, window, start, OWNER):
            rect = slot.rect
            assert torch.equal(slot.view(flat), tensors[slot.name][rect.r0 : rect.r1, rect.c0 : rect.c1])
            slot.view(seen).add_(1)
            origin = [p for p in held if p.name == slot.name and p.rect.meet(rect) == rect]
            assert slot.owner in {OWNER[p.replicas] for p in origin}
    assert torch.equal(seen, (flat >= 0).long())  # each element in one slot, padding in none


@settings(deadline=None)
@given(st.data())
def test_cover_finds_every_element_once_or_says_what_is_wrong(data):
    tiles = data.draw(tilings(7, 8))
    index: Index[int] = Index()
    for n, tile in enumerate(tiles):
        index.add("w", tile, n)
    wanted = data.draw(rects(7, 8))
    hits = index.cover("w", wanted)
    assert all(tiles[n] == held for _, held, n in hits)
    found = [e for overlap, _, _ in hits for e in elements(overlap)]
    assert len(found) == len(set(found)) and set(found) == elements(wanted)

    hurt = data.draw(st.sampled_from([n for _, _, n in hits]))
    common = tiles[hurt].meet(wanted).area
    incomplete: Index[int] = Index()
    for n, tile in enumerate(tiles):
        if n != hurt:
            incomplete.add("w", tile, n)
    with pytest.raises(ValueError, match=f"w rows .*: {common} missing of {wanted.area}"):
        incomplete.cover("w", wanted)
    index.add("w", tiles[hurt], -1)
    with pytest.raises(ValueError, match=f"{common} stored twice"):
        index.cover("w", wanted)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.sampled_from((0, 1)))
def test_shards_tile_a_tensor(size, other, count, dim):
    shape = (size, other) if dim == 0 else (other, size)
    parts = [shard("w", shape, dim, index, count) for index in range(count)]
    held = [e for part in parts for e in elements(part.rect)]
    assert len(held) == len(set(held)) == size * other


LAYOUTS = st.tuples(
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from(((1, 1), (2, 1), (4, 1), (2, 2))),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from((1, 2, 8)),
    st.integers(5, 40),
)


@settings(max_examples=25, deadline=None)
@given(LAYOUTS)
def test_optimizer_shards_own_every_canonical_element_once(layout):
    """Over all ranks of a layout, planned without processes: tp > K/V heads, tied, chunks, any dp and vocabulary."""
    tp, (pp, vpp), dp, tied, kv, vocab = layout
    model = ModelConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=kv,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    config = Config(model, ParallelConfig(tp, pp, vpp), DataConfig(seq_length=8), TrainConfig(dtype="float32"))
    shapes = {name: matrix(shape) for name, shape in canonical_shapes(model).items()}
    counted = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    in_norm = decayed = 0
    for rank in range(tp * pp * dp):
        mesh = sketch(rank, tp * pp * dp, tp, pp, kv, tied)
        optimizer = Zero1(build_stages(config, mesh), mesh, OptimConfig())
        for slot, _ in optimizer.slots():
            if slot.owner:
                r = slot.rect
                counted[slot.name][r.r0 : r.r1, r.c0 : r.c1] += 1
        for buckets in optimizer.buckets.values():
            for bucket in buckets:
                assert bucket.size % 64 == 0 and all(0 <= slot.start < bucket.size for slot in bucket.slots)
                in_norm += sum(hi - lo for lo, hi in bucket.owned)
                decayed += _own_matrix_elements(bucket.slots, bucket.decayed)
    assert all(bool((count == 1).all()) for count in counted.values())
    assert in_norm == sum(count.numel() for count in counted.values())
    assert decayed == sum(rows * cols for rows, cols in shapes.values() if rows > 1)


def _own_matrix_elements(slots: list[Slot], decayed: list[tuple[int, int]]) -> int:
    """Owned elements under weight decay; no element of a norm may be."""
    under = {n for lo, hi in decayed for n in range(lo, hi)}
    total = 0
    for slot in slots:
        r = slot.rect
        memory = {slot.start + i * slot.stride + j for i in range(r.height) for j in range(r.width)}
        assert memory <= under if "norm" not in slot.name else not memory & under
        total += len(memory) * (slot.owner and "norm" not in slot.name)
    return total


def test_padding_of_the_vocabulary_lies_in_no_piece():
    model = ModelConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=10,
    )
    config = Config(model, ParallelConfig(tp=4), DataConfig(seq_length=8))
    (stage,) = build_stages(config, sketch(3, 4, 4, 1, 2, False)).values()
    assert stage.embed.weight.shape == (3, 16)
    (piece,) = pieces(stage)["embed.weight"]
    assert (piece.rect, piece.local) == (Rect(9, 10, 0, 16), Rect(0, 1, 0, 16))
