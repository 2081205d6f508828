"""Every collective and parallel layer, forward and backward, against a plain formula on whole tensors in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import Ranks
from megallama.parallel.collectives import all_gather, all_reduce, reduce_scatter, start_all_gather
from megallama.parallel.grads import WeightGrads
from megallama.parallel.layers import ColumnLinear, Part, RowLinear, VocabEmbedding, VocabHead
from megallama.parallel.pieces import Rect, matrix
from megallama.runtime.mesh import Axis, build_mesh

WORLDS = (1, 2, 4)
TOKENS, IN, KV_ROWS = 8, 12, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    pools = {world: Ranks(world) for world in WORLDS}
    yield pools
    for pool in pools.values():
        pool.__exit__()


def axes_of(world: int, kv_heads: int = 1) -> tuple[Axis, Axis]:
    mesh = build_mesh(world, 1, kv_heads, False, torch.device("cpu"))
    return mesh.tp, mesh.kv


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(rank: int, world: int) -> tuple[Tensor, Tensor, float, float]:
    """gather(x) and reduce_scatter(y), and the two scalar products that conjugate operators make equal."""
    axis, _ = axes_of(world)
    x, y = random(3, 2, seed=rank), random(3 * world, 2, seed=100 + rank)
    before = x.clone(), y.clone()
    gathered, scattered = all_gather(x, axis), reduce_scatter(y, axis)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "inputs must stay as they are"
    return gathered.clone(), scattered.clone(), float((gathered * y).sum()), float((x * scattered).sum())


@pytest.mark.parametrize("world", WORLDS)
def test_gather_and_reduce_scatter_are_conjugate(groups, world):
    answers = groups[world].run(pair)
    whole = torch.cat([random(3, 2, seed=rank) for rank in range(world)])
    total = sum(random(3 * world, 2, seed=100 + rank) for rank in range(world))
    for rank, (gathered, scattered, _, _) in enumerate(answers):
        assert torch.equal(gathered, whole)
        torch.testing.assert_close(scattered, total.chunk(world)[rank], **EXACT)
    assert sum(a[2] for a in answers) == pytest.approx(sum(a[3] for a in answers), rel=1e-13)


def in_place(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    axis, _ = axes_of(world)
    flat = torch.full((2 * world,), -1.0)
    mine = flat[2 * rank : 2 * rank + 2]
    mine.fill_(rank)
    start_all_gather(mine, axis, flat).wait()
    total = all_reduce(torch.tensor([float(rank)]), axis)
    return flat, total, all_reduce(torch.tensor([float(rank)]), axis, dist.ReduceOp.MAX)


@pytest.mark.parametrize("world", WORLDS)
def test_gather_into_a_buffer_that_holds_the_input_and_reductions(groups, world):
    for flat, total, top in groups[world].run(in_place):
        assert flat.tolist() == [float(n // 2) for n in range(2 * world)]
        assert total.item() == sum(range(world)) and top.item() == world - 1


def fill(layer: nn.Module, axis: Axis, weights: dict[str, Tensor]) -> None:
    """The layer's rectangles of the canonical `weights`."""
    layer.to(torch.float64)
    for piece in layer.pieces["weight"]:
        r, at = piece.rect, piece.local
        local = layer.weight.data.view(matrix(tuple(layer.weight.shape)))
        local[at.r0 : at.r1, at.c0 : at.c1] = weights[piece.name][r.r0 : r.r1, r.c0 : r.c1]


Gradients = list[tuple[str, Rect, str, Tensor]]


def backward(layer: nn.Module, grads: WeightGrads, y: Tensor, dy: Tensor, deferred: bool) -> Gradients:
    """Run backward into an attached buffer; the weight's gradient as (name, rectangle, replicas, values)."""
    buffer = torch.full_like(layer.weight, torch.nan)  # the first contribution of a step overwrites
    grads.attach(layer.weight, buffer, 1)
    arrived: list[Tensor] = []
    grads.arrived = arrived.append
    grads.begin(1)
    grads.deferred = deferred
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before), "an incoming gradient must not be changed"
    products = grads.take_queue()
    assert len(products) == deferred * (not isinstance(layer, VocabEmbedding))
    with torch.no_grad():  # as the schedule's W action
        for product in products:
            product()
    assert arrived == [layer.weight] and layer.weight.grad is None
    out = []
    for piece in layer.pieces["weight"]:
        at = piece.local
        out.append((piece.name, piece.rect, piece.replicas, buffer[at.r0 : at.r1, at.c0 : at.c1].clone()))
    return out


def same_gradients(answers: list[Gradients], expected: dict[str, Tensor]) -> None:
    """Shards put together, and replicas' parts summed, are the whole gradient."""
    found = {name: torch.zeros_like(g) for name, g in expected.items()}
    for gradients in answers:
        for name, r, _, values in gradients:
            found[name][r.r0 : r.r1, r.c0 : r.c1] += values
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, **EXACT)


def column_weights() -> dict[str, Tensor]:
    return {"q": random(16, IN, seed=1), "k": random(KV_ROWS, IN, seed=2), "v": random(KV_ROWS, IN, seed=3)}


def column(rank: int, world: int, deferred: bool) -> tuple[Tensor, Tensor, list, Gradients]:
    """Two K/V heads of three rows: on four ranks each is held twice."""
    axis, _ = axes_of(world, 2)
    copies, grads = max(1, world // 2), WeightGrads()
    layer = ColumnLinear([Part("q", 16), Part("k", KV_ROWS, copies), Part("v", KV_ROWS, copies)], IN, axis, grads)
    fill(layer, axis, column_weights())
    x = random(TOKENS, IN).chunk(world)[rank].clone().requires_grad_()
    y = layer(x)
    wholes = {"q": random(TOKENS, 16, seed=11), "k": random(TOKENS, 6, seed=12), "v": random(TOKENS, 6, seed=13)}
    dy, outputs = torch.zeros_like(y), []
    for piece in layer.pieces["weight"]:
        rows = slice(piece.local.r0, piece.local.r1)
        share = 1 / copies if piece.replicas == "kv" else 1.0  # copies' parts add up to the whole
        dy[:, rows] = wholes[piece.name][:, piece.rect.r0 : piece.rect.r1] * share
        outputs.append((piece.name, piece.rect, y[:, rows].detach().clone()))
    found = backward(layer, grads, y, dy, deferred)
    assert x.grad is not None
    return y.detach(), x.grad, outputs, found


@pytest.mark.parametrize("deferred", (False, True))
@pytest.mark.parametrize("world", WORLDS)
def test_column_parallel_linear_with_copied_heads(groups, world, deferred):
    weights = {name: w.requires_grad_() for name, w in column_weights().items()}
    x = random(TOKENS, IN).requires_grad_()
    whole = {name: x @ w.t() for name, w in weights.items()}
    torch.autograd.backward(
        list(whole.values()), [random(TOKENS, 16, seed=11), random(TOKENS, 6, seed=12), random(TOKENS, 6, seed=13)]
    )
    answers = groups[world].run(column, deferred)
    for _, _, outputs, _ in answers:
        for name, rect, y in outputs:
            torch.testing.assert_close(y, whole[name][:, rect.r0 : rect.r1].detach(), **EXACT)
    torch.testing.assert_close(torch.cat([dx for _, dx, _, _ in answers]), x.grad, **EXACT)
    same_gradients([found for *_, found in answers], {name: w.grad for name, w in weights.items()})


def row(rank: int, world: int, deferred: bool) -> tuple[Tensor, Tensor, Gradients]:
    axis, _ = axes_of(world)
    grads = WeightGrads()
    layer = RowLinear("o", 5, IN, axis, grads)
    fill(layer, axis, {"o": random(5, IN, seed=1)})
    x = random(TOKENS, IN).chunk(world, 1)[rank].clone().requires_grad_()
    y = layer(x)
    found = backward(layer, grads, y, random(TOKENS, 5, seed=2).chunk(world)[rank].clone(), deferred)
    assert x.grad is not None
    return y.detach(), x.grad, found


@pytest.mark.parametrize("deferred", (False, True))
@pytest.mark.parametrize("world", WORLDS)
def test_row_parallel_linear(groups, world, deferred):
    w, x = random(5, IN, seed=1).requires_grad_(), random(TOKENS, IN).requires_grad_()
    whole = x @ w.t()
    whole.backward(random(TOKENS, 5, seed=2))
    answers = groups[world].run(row, deferred)
    torch.testing.assert_close(torch.cat([y for y, _, _ in answers]), whole.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([dx for _, dx, _ in answers], 1), x.grad, **EXACT)
    same_gradients([found for *_, found in answers], {"o": w.grad})


def embedding(rank: int, world: int, vocab: int) -> tuple[Tensor, Gradients]:
    axis, _ = axes_of(world)
    grads = WeightGrads()
    layer = VocabEmbedding("e", vocab, 3, axis, grads)
    fill(layer, axis, {"e": random(vocab, 3, seed=1)})
    y = layer(tokens_of(vocab))
    return y.detach(), backward(layer, grads, y, random(TOKENS, 3, seed=2).chunk(world)[rank].clone(), False)


def tokens_of(vocab: int) -> Tensor:
    """Every shard is asked, and one token several times."""
    return torch.tensor([0, vocab - 1, 1, 0, vocab // 2, vocab - 1, 0, vocab // 3])


@pytest.mark.parametrize(("world", "vocab"), [(1, 10), (2, 9), (4, 10), (4, 3)])
def test_vocabulary_embedding(groups, world, vocab):
    w = random(vocab, 3, seed=1).requires_grad_()
    whole = w[tokens_of(vocab)]
    whole.backward(random(TOKENS, 3, seed=2))
    answers = groups[world].run(embedding, vocab)
    assert torch.equal(torch.cat([y for y, _ in answers]), whole.detach())
    same_gradients([found for _, found in answers], {"e": w.grad})


def head(rank: int, world: int, vocab: int) -> tuple[Tensor, Tensor, Gradients]:
    axis, _ = axes_of(world)
    grads = WeightGrads()
    layer = VocabHead("h", vocab, IN, axis, grads)
    fill(layer, axis, {"h": random(vocab, IN, seed=1)})
    x = random(TOKENS, IN).chunk(world)[rank].clone().requires_grad_()
    y = layer(x)
    dy = torch.zeros(TOKENS, y.shape[1] * world, dtype=torch.float64)
    dy[:, :vocab] = random(TOKENS, vocab, seed=2)
    found = backward(layer, grads, y, dy.chunk(world, 1)[rank].clone(), False)
    assert x.grad is not None
    return y.detach(), x.grad, found


@pytest.mark.parametrize(("world", "vocab"), [(1, 10), (2, 9), (4, 10), (4, 3)])
def test_vocabulary_head(groups, world, vocab):
    w, x = random(vocab, IN, seed=1).requires_grad_(), random(TOKENS, IN).requires_grad_()
    whole = x @ w.t()
    whole.backward(random(TOKENS, vocab, seed=2))
    answers = groups[world].run(head, vocab)
    torch.testing.assert_close(torch.cat([y for y, _, _ in answers], 1)[:, :vocab], whole.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([dx for _, dx, _ in answers]), x.grad, **EXACT)
    same_gradients([found for *_, found in answers], {"h": w.grad})


@pytest.mark.parametrize("layer_of", (lambda a, g: RowLinear("w", 5, 7, a, g), lambda a, g: VocabHead("w", 5, 7, a, g)))
def test_contributions_of_several_micro_batches_add_up_in_float32(layer_of: Callable):
    """bf16 weights, fp32 buffer: small contributions are not rounded away."""
    grads = WeightGrads()
    layer = layer_of(Axis(), grads).to(torch.bfloat16)
    buffer = torch.full(layer.weight.shape, torch.nan)
    grads.attach(layer.weight, buffer, 1)
    grads.begin(256)
    x = torch.ones(1, 7, dtype=torch.bfloat16, requires_grad=True)
    for n in range(256):
        layer(x).backward(torch.full((1, 5), 1.0 if n == 0 else 2.0**-10, dtype=torch.bfloat16))
    assert torch.equal(buffer, torch.full_like(buffer, 1 + 255 * 2.0**-10))
