"""AdamW over shards against its paper's formula on whole tensors in fp64, on one to four data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distributed import Ranks
from megallama.config import OptimConfig
from megallama.optim import Zero1, zero1
from megallama.parallel.collectives import all_reduce
from megallama.parallel.grads import PipelineStage, WeightGrads
from megallama.parallel.pieces import Rect, matrix, whole
from megallama.runtime.mesh import Mesh, build_mesh

SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "norm": (13,), "b": (3, 65), "unused": (9, 2), "c": (1, 1)}
"""Canonical tensors of odd sizes, one a unit; "unused" gets a gradient in the first step alone."""

STEPS, LR = 4, 0.05
OPTIM = OptimConfig(lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)


class Unit(nn.Module):
    """One parameter that holds a whole canonical tensor."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.pieces = {"weight": [whole(name, shape)]}


class Weights(PipelineStage):
    """A stage without a forward pass: tests hand gradients over themselves."""

    def __init__(self, dtype: torch.dtype = torch.float64, shapes: dict[str, tuple[int, ...]] = SHAPES):
        super().__init__()
        self.grads = WeightGrads()
        self.parts = nn.ModuleDict({name: Unit(name, shape, dtype) for name, shape in shapes.items()})

    def units(self) -> list[nn.Module]:
        return list(self.parts.values())


def draw(shape: tuple[int, ...], *seed: int) -> Tensor:
    number = sum(s * 100**n for n, s in enumerate(seed))
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def initial(name: str) -> Tensor:
    return draw(SHAPES[name], list(SHAPES).index(name))


def gradient(name: str, step: int, rank: int, micro: int) -> Tensor | None:
    """What one micro-batch of one replica adds; the last step's are small, so that clipping leaves them alone."""
    if name == "unused" and step:
        return None
    return draw(SHAPES[name], list(SHAPES).index(name), step + 1, rank, micro) * (1e-3 if step == STEPS - 1 else 1)


def wide_mesh() -> Mesh:
    """All ranks are data-parallel."""
    return build_mesh(1, 1, 1, False, torch.device("cpu"))


class Result(NamedTuple):
    """What a rank has after each step: global norms, weights by name; and at the end all that lies in padding."""

    norms: list[float]
    weights: list[dict[str, Tensor]]
    padding: float


def train(rank: int, world: int, bucket_elements: int) -> Result:
    zero1.BUCKET_ELEMENTS = bucket_elements
    mesh, stage = wide_mesh(), Weights()
    optimizer = Zero1({0: stage}, mesh, OPTIM)

    def read(name: str, rect: Rect, out: Tensor) -> None:
        out.copy_(initial(name).view(matrix(SHAPES[name]))[rect.r0 : rect.r1, rect.c0 : rect.c1])

    optimizer.load_weights(read)
    norms, weights = [], []
    for step in range(STEPS):
        optimizer.begin(2)
        for micro in range(2):
            for name in reversed(SHAPES):
                if (grad := gradient(name, step, rank, micro)) is not None:
                    stage.grads.add(stage.parts[name].weight, grad)
        optimizer.reduce(0)
        gradients = optimizer.gradients()
        norm = math.sqrt(all_reduce(optimizer.square_norm(gradients), mesh.world))
        optimizer.update(gradients, LR * (step + 1), min(1.0, 1 / (norm + 1e-6)))
        for bucket in optimizer.buckets[0]:
            bucket.ready()
        norms.append(norm)
        weights.append({name: unit.weight.detach().clone() for name, unit in stage.parts.items()})
    return Result(norms, weights, sum(_in_padding(optimizer)))


def _in_padding(optimizer: Zero1) -> Iterator[float]:
    """Sums of magnitudes outside of all slots."""
    for bucket in optimizer.buckets[0]:
        covered = torch.zeros(bucket.size)
        for slot in bucket.slots:
            slot.view(covered).fill_(1)
        for flat in (bucket.master, bucket.exp_avg, bucket.exp_avg_sq):
            yield float(flat[covered == 0].abs().sum())
        used = sum(weight.numel() for weight, _ in bucket.held)
        yield float(bucket.weights[used:].abs().sum() + bucket.grads[used:].abs().sum())


def reference(world: int) -> Result:
    """Loshchilov & Hutter 2019, algorithm 2, tensor by tensor; the norm's coefficient is PyTorch's."""
    (beta1, beta2), eps, decay = OPTIM.betas, OPTIM.eps, OPTIM.weight_decay
    theta = {name: initial(name) for name in SHAPES}
    m, v = ({name: torch.zeros_like(x) for name, x in theta.items()} for _ in range(2))
    norms, weights = [], []
    for t in range(1, STEPS + 1):
        grads = {name: torch.zeros_like(x) for name, x in theta.items()}
        for name, total in grads.items():
            for rank in range(world):
                for micro in range(2):
                    if (grad := gradient(name, t - 1, rank, micro)) is not None:
                        total += grad
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, x in theta.items():
            g = grads[name] * min(1.0, 1 / (norm + 1e-6))
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            matrix_decay = decay if x.dim() == 2 else 0.0
            theta[name] = x - LR * t * (m_hat / (v_hat.sqrt() + eps) + matrix_decay * x)
        norms.append(norm)
        weights.append(dict(theta))
    return Result(norms, weights, 0.0)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ExitStack() as stack:
        yield {size: stack.enter_context(Ranks(size)) for size in (1, 2, 3, 4)}


@pytest.fixture(autouse=True)
def own_bucket_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank trains in this very process: what `train` sets must not last."""
    monkeypatch.setattr(zero1, "BUCKET_ELEMENTS", zero1.BUCKET_ELEMENTS)


@pytest.mark.parametrize("bucket_elements", [1 << 20, 1], ids=["one bucket", "a bucket a unit"])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_updates_equal_the_papers_formula(groups: dict[int, Ranks], dp: int, bucket_elements: int) -> None:
    """Weights, norm before clipping, zero padding; a weight without gradient must not see its last one again."""
    expected = reference(dp)
    assert max(expected.norms) > 1 > min(expected.norms), "both sides of the clipping must occur"
    for result in groups[dp].run(train, bucket_elements):
        assert result.norms == pytest.approx(expected.norms, rel=1e-13)
        for ours, theirs in zip(result.weights, expected.weights, strict=True):
            for name, weight in theirs.items():
                torch.testing.assert_close(ours[name], weight, rtol=1e-11, atol=1e-12, msg=name)
        assert result.padding == 0


def only_on(rank: int, world: int, contributor: int) -> list[Tensor]:
    """Two steps in which one replica alone has a gradient for the first tensor: ones, then twos."""
    zero1.BUCKET_ELEMENTS = 1 << 20
    stage = Weights(shapes={"a": (3, 5), "b": (2, 2)})
    optimizer = Zero1({0: stage}, wide_mesh(), OPTIM)
    seen = []
    for step in (1, 2):
        optimizer.begin(1)
        stage.grads.add(stage.parts["b"].weight, torch.zeros(2, 2))
        if rank == contributor:
            stage.grads.add(stage.parts["a"].weight, torch.full((3, 5), float(step)))
        optimizer.reduce(0)
        (pair,) = optimizer.gradients()
        seen += [slot.view(pair[1]).clone() for slot in pair[0].slots if slot.name == "a"]
        contributor = 1 - contributor
    return seen


def test_a_replica_without_gradient_adds_zero(groups: dict[int, Ranks]) -> None:
    """The first rank's shard holds all of the tensor; the other replica contributes in the second step."""
    first, second = groups[2].run(only_on, 0)[0]
    assert (first == 1).all(), "in the first step rank 0 alone"
    assert (second == 2).all(), "in the second step rank 1 alone: rank 0's ones are stale"


def creep(dtype: torch.dtype, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """(weight, master) of ones after `steps` updates of exactly `lr` each: a constant gradient, no decay, no clip."""
    stage = Weights(dtype, {"w": (4, 3)})
    optimizer = Zero1({0: stage}, Mesh(), OptimConfig(weight_decay=0.0, eps=1e-12))
    optimizer.load_weights(lambda name, rect, out: out.fill_(1))
    for _ in range(steps):
        optimizer.begin(1)
        stage.grads.add(stage.parts["w"].weight, torch.ones(4, 3, dtype=dtype))
        optimizer.update(optimizer.gradients(), lr, 1.0)
    (bucket,) = optimizer.buckets[0]
    return stage.parts["w"].weight.detach(), bucket.master[:12].view(4, 3)


def test_updates_below_one_ulp_add_up_in_the_masters() -> None:
    """Below 1 a bf16 ulp is 2^-8; forty updates of 2^-14 move no weight at first, yet all of them count."""
    weight, master = creep(torch.bfloat16, 10, 2**-14)
    assert (weight == 1).all()
    torch.testing.assert_close(master, torch.full((4, 3), 1 - 10 * 2**-14), rtol=1e-6, atol=0)
    weight, master = creep(torch.bfloat16, 64, 2**-14)
    torch.testing.assert_close(master, torch.full((4, 3), 1 - 2**-8), rtol=1e-6, atol=0)
    assert (weight == 1 - 2**-8).all()


def test_gradients_accumulate_in_fp32_under_bf16() -> None:
    """256 ones and then more: in bf16 the sum would stop at 256."""
    stage = Weights(torch.bfloat16, {"w": (2, 2)})
    optimizer = Zero1({0: stage}, Mesh(), OPTIM)
    optimizer.begin(300)
    for _ in range(300):
        stage.grads.add(stage.parts["w"].weight, torch.ones(2, 2, dtype=torch.bfloat16))
    ((_, grad),) = optimizer.gradients()
    assert grad[:4].tolist() == [300.0] * 4
    assert float(optimizer.square_norm([(optimizer.buckets[0][0], grad)])) == pytest.approx(4 * 300**2)
