"""Vocabulary-parallel log-probabilities against a plain log-softmax over the whole vocabulary, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from distributed import Ranks
from megallama.parallel import loss
from megallama.parallel.loss import cross_entropy_sum, log_probs
from megallama.runtime.mesh import Axis, build_mesh

TOKENS, IGNORE = 14, -100


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    pools = {world: Ranks(world) for world in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.__exit__()


def axis_of(world: int) -> Axis:
    return build_mesh(world, 1, world, False, torch.device("cpu")).tp


def case(vocab: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, vocab), labels on every shard, and a weight for each token's result."""
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(TOKENS, vocab, generator=random, dtype=torch.float64) * scale
    labels = torch.arange(TOKENS) * (vocab - 1) // (TOKENS - 1)
    return logits, labels, torch.randn(TOKENS, generator=random, dtype=torch.float64)


def shard_of(x: Tensor, axis: Axis, garbage: float) -> Tensor:
    """This rank's columns; padded columns hold garbage, as a matrix product over unused rows may leave it."""
    held = -(-x.shape[1] // axis.size)
    padded = torch.full((x.shape[0], held * axis.size), garbage, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded[:, axis.rank * held :][:, :held].clone()


def on_shards(rank: int, world: int, vocab: int, scale: float, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor]:
    """(log-probs, gradient of their weighted sum) on this rank's shard."""
    axis = axis_of(world)
    logits, labels, weights = case(vocab, scale)
    leaf = shard_of(logits, axis, garbage=1e4).to(dtype).requires_grad_()
    with mock.patch.dict(loss.CHUNK_BYTES, {"cpu": chunk}):
        result = log_probs(leaf.clone(), labels, vocab, axis)
        (result * weights.to(result.dtype)).sum().backward()
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize("chunk", (1, 1 << 20), ids=("row by row", "at once"))
@pytest.mark.parametrize("scale", (1.0, 1000.0))
@pytest.mark.parametrize(("world", "vocab"), [(1, 10), (2, 10), (2, 9), (4, 10), (4, 5), (4, 3)])
def test_log_probs_and_their_gradient(groups, world, vocab, scale, chunk):
    """10 over 4: padded columns; 5 and 3 over 4: shards made of padding only."""
    logits, labels, weights = case(vocab, scale)
    logits.requires_grad_()
    expected = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    (expected * weights).sum().backward()
    answers = groups[world].run(on_shards, vocab, scale, torch.float64, chunk)
    for result, _ in answers:
        torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(result, answers[0][0])
    grads = torch.cat([grad for _, grad in answers], 1)
    torch.testing.assert_close(grads[:, :vocab], logits.grad, rtol=1e-12, atol=1e-12)
    assert not grads[:, vocab:].any()


def test_bfloat16_logits_are_summed_in_float32(groups):
    logits, labels, _ = case(10, 3.0)
    expected = logits.bfloat16().float().log_softmax(1).gather(1, labels[:, None])[:, 0]
    for result, grad in groups[2].run(on_shards, 10, 3.0, torch.bfloat16, 64):
        assert result.dtype == torch.float32 and grad.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # only what backward reads is rounded


def masked_sum(rank: int, world: int, vocab: int) -> tuple[float, Tensor]:
    axis = axis_of(world)
    logits, labels, _ = case(vocab, 1.0)
    labels[::3] = IGNORE
    leaf = shard_of(logits, axis, garbage=0.0).requires_grad_()
    total = cross_entropy_sum(leaf.clone(), labels, vocab, axis, IGNORE)
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


@pytest.mark.parametrize("world", (1, 4))
def test_cross_entropy_leaves_masked_labels_out(groups, world):
    logits, labels, _ = case(10, 1.0)
    labels[::3] = IGNORE
    logits.requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    expected.backward()
    answers = groups[world].run(masked_sum, 10)
    assert all(total == pytest.approx(expected.item(), rel=1e-13) for total, _ in answers)
    grads = torch.cat([grad for _, grad in answers], 1)[:, :10]
    torch.testing.assert_close(grads, logits.grad, rtol=1e-12, atol=1e-14)
    assert not grads[::3].any()


def all_masked(rank: int, world: int) -> tuple[float, Tensor]:
    leaf = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    total = cross_entropy_sum(leaf.clone(), torch.full((4,), IGNORE), 6, axis_of(world), IGNORE)
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


def test_a_micro_batch_without_labels_gives_zero(groups):
    for total, grad in groups[2].run(all_masked):
        assert total == 0 and not grad.any()
