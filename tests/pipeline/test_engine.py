"""The engine: every schedule's gradients are one process's, and it holds just the activations that are promised."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distributed import Ranks
from megallama.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megallama.data.batch import IGNORE, Batch
from megallama.model.llama import Stage
from megallama.parallel.pieces import Rect
from megallama.pipeline import Action, build, lower, peak_activations
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import NextToken, Trainer, build_trainer

MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=37,
    initializer_range=0.1,
)
SCALE = 0.125
ONE = ParallelConfig()

# name -> (layout, micro-batches); fewer micro-batches than stages, uneven stages and empty end stages among them
CASES: dict[str, tuple[ParallelConfig, int]] = {
    "gpipe-2": (ParallelConfig(pp=2, schedule="gpipe"), 4),
    "1f1b-2": (ParallelConfig(pp=2), 5),
    "zero-bubble-2": (ParallelConfig(pp=2, schedule="zero-bubble"), 4),
    "interleaved-2x2": (ParallelConfig(pp=2, vpp=2, schedule="interleaved"), 4),
    "interleaved-2x3-uneven": (
        ParallelConfig(pp=2, vpp=3, schedule="interleaved", layers_per_stage=(0, 3, 1, 1, 2, 1)),
        6,
    ),
    "gpipe-4": (ParallelConfig(pp=4, schedule="gpipe"), 6),
    "1f1b-4": (ParallelConfig(pp=4), 8),
    "1f1b-4-one-micro": (ParallelConfig(pp=4), 1),
    "1f1b-4-uneven": (ParallelConfig(pp=4, layers_per_stage=(0, 5, 3, 0)), 5),
    "zero-bubble-4": (ParallelConfig(pp=4, schedule="zero-bubble"), 8),
    "zero-bubble-4-two-micros": (ParallelConfig(pp=4, schedule="zero-bubble", layers_per_stage=(3, 1, 2, 2)), 2),
    "interleaved-4x2": (ParallelConfig(pp=4, vpp=2, schedule="interleaved"), 8),
    "full-recompute-4": (ParallelConfig(pp=4, schedule="zero-bubble", recompute="full"), 4),
}
MIXED: dict[str, tuple[ParallelConfig, int]] = {
    "1f1b-2-dp2": (ParallelConfig(pp=2), 6),
    "zero-bubble-2-tp2": (ParallelConfig(pp=2, tp=2, schedule="zero-bubble"), 4),
    "interleaved-2x2-dp2": (ParallelConfig(pp=2, vpp=2, schedule="interleaved"), 8),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    with ExitStack() as stack:
        yield {size: stack.enter_context(Ranks(size)) for size in (1, 2, 4)}


def micro_batches(count: int, multiple: int = 1) -> list[Batch]:
    """Micro-batches of unequal length, with unequal numbers of labels; one has none at all."""
    random, batches = torch.Generator().manual_seed(3), []
    for n in range(count):
        rows = []
        for length in (5 + n % 3, 4 + 2 * n % 5):
            tokens = torch.randint(MODEL.vocab_size, (length + 1,), generator=random)
            labels = tokens[1:].clone()
            labels[: length if n == 2 else n % 3] = IGNORE
            rows.append((tokens[:-1], labels))
        batches.append(Batch.pack(rows, multiple))
    return batches


def open_trainer(parallel: ParallelConfig, model: ModelConfig) -> Trainer:
    config = Config(model=model, parallel=parallel, train=TrainConfig(dtype="float64", seed=7))
    device = torch.device("cpu")
    mesh = build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tie_word_embeddings, device)
    return build_trainer(config, mesh)


class Outcome(NamedTuple):
    """One rank's training pass: losses of the last stage, and its canonical rectangles' gradients."""

    losses: list[Tensor]
    gradients: dict[tuple[str, Rect], Tensor]


def train(rank: int, world: int, parallel: ParallelConfig, count: int, model: ModelConfig, passes: int = 2) -> Outcome:
    """Gradients of the last of several passes: nothing may be left over from the one before."""
    trainer = open_trainer(parallel, model)
    mesh, optimizer = trainer.mesh, trainer.optimizer
    assert optimizer is not None
    micros = micro_batches(count, mesh.tp.size)[mesh.dp.rank :: mesh.dp.size]
    program = lower(build(parallel.schedule, parallel.pp, len(micros), parallel.vpp))
    for _ in range(passes):
        optimizer.begin(len(micros))
        run = trainer.engine.train(program[mesh.pp.rank], micros, NextToken(model.vocab_size, mesh.tp), SCALE)
        reduced = optimizer.gradients()
    found = {(s.name, s.rect): s.view(grad).clone() for bucket, grad in reduced for s in bucket.slots}
    return Outcome(run.losses, found)


@pytest.mark.parametrize(("parallel", "count"), CASES.values(), ids=CASES.keys())
def test_gradients_are_bitwise_those_of_one_process(
    groups: dict[int, Ranks], parallel: ParallelConfig, count: int
) -> None:
    """Each micro-batch goes through the same products in the same order, whoever computes them."""
    expected = train(0, 1, ONE, count, MODEL)
    ranks = groups[parallel.pp].run(train, parallel, count, MODEL)
    assert [len(r.losses) for r in ranks] == [0] * (parallel.pp - 1) + [count]
    assert all(torch.equal(a, b) for a, b in zip(ranks[-1].losses, expected.losses, strict=True))
    assert sum(len(r.gradients) for r in ranks) == len(expected.gradients), "every tensor lies on one rank"
    for outcome in ranks:
        for key, grad in outcome.gradients.items():
            assert torch.equal(grad, expected.gradients[key]), key


def whole(ranks: list[Outcome], like: dict[tuple[str, Rect], Tensor]) -> dict[str, Tensor]:
    """Canonical tensors from rectangles; where several ranks hold one, their values must agree."""
    out = {name: torch.full_like(grad, float("nan")) for (name, _), grad in like.items()}
    for outcome in ranks:
        for (name, r), grad in outcome.gradients.items():
            place = out[name][r.r0 : r.r1, r.c0 : r.c1]
            assert place.isnan().all() or torch.equal(place, grad), f"copies of {name} differ"
            place.copy_(grad)
    return out


@pytest.mark.parametrize(("parallel", "count"), MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("model", [MODEL, replace(MODEL, tie_word_embeddings=True)], ids=["untied", "tied"])
def test_gradients_of_mixed_layouts(
    groups: dict[int, Ranks], parallel: ParallelConfig, count: int, model: ModelConfig
) -> None:
    """Sums over replicas, tp or tied copies come in another order: fp64 rounding is all that may differ."""
    expected = train(0, 1, ONE, count, model)
    found = whole(groups[4].run(train, parallel, count, model), expected.gradients)
    for (name, _), grad in expected.gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-14, msg=name)


def forward(rank: int, world: int, parallel: ParallelConfig, count: int) -> list[Tensor]:
    return open_trainer(parallel, MODEL).infer(micro_batches(count, parallel.tp), lambda y, b: y[: b.length - 1])


@pytest.mark.parametrize("count", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(pp=2), ParallelConfig(pp=4), ParallelConfig(pp=2, vpp=2, schedule="interleaved")],
    ids=["pp2", "pp4", "pp2-vpp2"],
)
def test_forward_only_reaches_all_ranks(groups: dict[int, Ranks], parallel: ParallelConfig, count: int) -> None:
    """Any number of micro-batches, also where the training schedule wants a multiple."""
    expected = forward(0, 1, ONE, count)
    assert len({x.shape for x in expected}) == len(expected)
    for results in groups[parallel.pp].run(forward, parallel, count):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


class LiveBytes:
    """Bytes of memory that blocks saved for their backward and that is still alive; weights do not count."""

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.optimizer is not None
        buckets = [bucket for buckets in trainer.optimizer.buckets.values() for bucket in buckets]
        self._known = {bucket.weights.untyped_storage()._cdata for bucket in buckets}
        self.now = self.peak = 0
        for stage in trainer.stages.values():
            for block in stage.blocks:
                self._listen(block)

    def _listen(self, block: torch.nn.Module) -> None:
        plain = block.forward

        def listening(*inputs):
            with saved_tensors_hooks(self._pack, lambda x: x):
                return plain(*inputs)

        block.forward = listening  # type: ignore[method-assign]

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return x

    def _free(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


class Memory(NamedTuple):
    """Bytes: of one block's activations, of what is left of them between B and W, and the peak of a step."""

    whole: int
    kept: int
    peak: int


def measure(rank: int, world: int, parallel: ParallelConfig, count: int) -> Memory:
    """One block a stage; all micro-batches alike."""
    trainer = open_trainer(parallel, replace(MODEL, num_hidden_layers=parallel.stages))
    mesh, optimizer, live = trainer.mesh, trainer.optimizer, LiveBytes(trainer)
    assert optimizer is not None
    batch = micro_batches(1)[0]
    units, kept = zip(*(block_bytes(stage, batch, live) for stage in trainer.stages.values()), strict=True)
    assert len(set(units)) == 1, "all stages' blocks are alike"
    assert live.now == 0
    live.peak = 0
    optimizer.begin(count)
    program = lower(build(parallel.schedule, parallel.pp, count, parallel.vpp))
    trainer.engine.train(program[mesh.pp.rank], [batch] * count, NextToken(MODEL.vocab_size, mesh.tp), SCALE)
    optimizer.gradients()
    assert live.now == 0, "all activations are free after the step"
    return Memory(units[0], max(kept), live.peak)


def block_bytes(stage: Stage, batch: Batch, live: LiveBytes) -> tuple[int, int]:
    """Bytes held after a lone forward pass, and after a backward pass whose weight gradients wait."""
    x = None if stage.span.embed else torch.randn(batch.length, MODEL.hidden_size, dtype=torch.float64).requires_grad_()
    y = stage(x, batch)
    before = live.now
    stage.grads.deferred = True
    y.sum().backward()
    del x, y
    after = live.now
    stage.grads.take_queue()
    return before, after


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_live_activations_are_those_promised(groups: dict[int, Ranks], ranks: int, schedule: str) -> None:
    """Measured on every rank, to the byte. Between B and W a block keeps the inputs of its four linears."""
    parallel, count = ParallelConfig(pp=ranks, vpp=2 if schedule == "interleaved" else 1, schedule=schedule), 2 * ranks
    memory = groups[ranks].run(measure, parallel, count)
    inputs = 8 * micro_batches(1)[0].length * (3 * MODEL.hidden_size + MODEL.intermediate_size)
    program = build(schedule, ranks, count, parallel.vpp)
    for rank, found in enumerate(memory):
        assert found.kept == inputs
        promised = peak_activations(program, found.kept / found.whole)[rank]
        assert found.peak == pytest.approx(promised * found.whole, abs=1e-6)


def test_one_process_can_run_all_stages() -> None:
    """Stages that follow each other on one rank hand over in memory: nothing is sent, no process group is needed."""
    chunks, count = 4, 3
    config = Config(model=MODEL, parallel=ParallelConfig(vpp=chunks), train=TrainConfig(dtype="float64", seed=7))
    mesh = build_mesh(1, 1, MODEL.num_key_value_heads, False, torch.device("cpu"))
    trainer = build_trainer(config, mesh)
    assert len(trainer.stages) == chunks and trainer.optimizer is not None
    forwards = [Action("F", stage, micro) for micro in range(count) for stage in range(chunks)]
    backwards = [Action("B", stage, micro) for micro in range(count) for stage in reversed(range(chunks))]
    row = lower([forwards + backwards])[0]
    assert {action.kind for action in row} == {"F", "B", "G"}
    trainer.optimizer.begin(count)
    trainer.engine.train(row, micro_batches(count), NextToken(MODEL.vocab_size, mesh.tp), SCALE)
    expected = train(0, 1, ONE, count, MODEL).gradients
    for bucket, grad in trainer.optimizer.gradients():
        for slot in bucket.slots:
            assert torch.equal(slot.view(grad), expected[slot.name, slot.rect])
