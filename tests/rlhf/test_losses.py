"""PPO's losses against their formulas over a whole vocabulary in fp64, token by token; and small worlds they solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed import Ranks
from megallama.data.batch import IGNORE, Batch
from megallama.parallel import WeightGrads, loss
from megallama.parallel.layers import VocabHead
from megallama.rlhf.ppo import losses
from megallama.rlhf.ppo.advantages import gae, moments, whiten_by
from megallama.rlhf.ppo.losses import PolicyLoss, TokenLogProbs, ValueLoss, entropy, explained_variance
from megallama.rlhf.ppo.rewards import token_rewards, whiten
from megallama.runtime.mesh import ONE, Axis, build_mesh

TOKENS = 14


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    pools = {world: Ranks(world) for world in (1, 2)}
    yield pools
    for pool in pools.values():
        pool.__exit__()


def axis_of(world: int) -> Axis:
    return build_mesh(world, 1, world, False, torch.device("cpu")).tp


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(labels: Tensor, **extras: Tensor) -> Batch:
    count = int((labels != IGNORE).sum())
    return Batch(torch.zeros_like(labels), labels, torch.arange(len(labels)), (0, len(labels)), count, extras)


def case(vocab: int, scale: float = 1.0) -> tuple[Tensor, Batch]:
    """Logits (T, vocab) and a batch in which every third token is a prompt's, and labels lie on every shard."""
    logits = draw(TOKENS, vocab, seed=vocab) * scale
    labels = torch.arange(TOKENS) * (vocab - 1) // (TOKENS - 1)
    masked = torch.arange(TOKENS) % 3 == 0
    old = logits.log_softmax(1).gather(1, labels[:, None])[:, 0] + 0.4 * draw(TOKENS, seed=1)
    extras = {"old_log_probs": old, "advantages": draw(TOKENS, seed=2)}
    extras = {name: x.masked_fill(masked, 0) for name, x in extras.items()}
    return logits, batch_of(labels.masked_fill(masked, IGNORE), **extras)


class Policy(NamedTuple):
    """What PolicyLoss should give."""

    loss: Tensor
    metrics: dict[str, float]


def policy_oracle(logits: Tensor, batch: Batch, clip: float, temperature: float) -> Policy:
    """Token by token; `logits` (T, vocab) are whole."""
    old, advantages = batch.extras["old_log_probs"], batch.extras["advantages"]
    total, sums = torch.zeros((), dtype=torch.float64), np.zeros(4)
    for t, label in enumerate(batch.labels.tolist()):
        if label != IGNORE:
            log_p = (logits[t] / temperature).log_softmax(0)
            ratio = (log_p[label] - old[t]).exp()
            near = ratio.clamp(1 - clip, 1 + clip)
            total = total - torch.min(ratio * advantages[t], near * advantages[t])
            r, a, p = ratio.item(), advantages[t].item(), log_p.detach().exp().numpy()
            frozen = (r > 1 + clip and a > 0) or (r < 1 - clip and a < 0)
            sums += [r, frozen, r - 1 - math.log(r), -sum(q * math.log(q) for q in p if q)]
    return Policy(total, dict(zip(("ratio", "clip_fraction", "approx_kl", "entropy"), sums.tolist(), strict=True)))


def shard_of(x: Tensor, axis: Axis) -> Tensor:
    """This rank's columns; padded columns hold garbage, as a matrix product over unused rows may leave it."""
    held = -(-x.shape[1] // axis.size)
    padded = torch.full((x.shape[0], held * axis.size), 1e4, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    return padded[:, axis.rank * held :][:, :held].clone()


class Found(NamedTuple):
    """What one rank computed."""

    log_probs: Tensor
    loss: Tensor
    metrics: dict[str, float]
    grad: Tensor


def on_shards(rank: int, world: int, vocab: int, scale: float, temperature: float, chunk: int) -> Found:
    axis, (logits, batch) = axis_of(world), case(vocab, scale)
    with mock.patch.dict(loss.CHUNK_BYTES, {"cpu": chunk}):
        assert losses.CHUNK_BYTES["cpu"] == chunk
        read = TokenLogProbs(vocab, axis, temperature)(shard_of(logits, axis), batch)
        leaf = shard_of(logits, axis).requires_grad_()
        total, metrics = PolicyLoss(vocab, axis, 0.2, temperature)(leaf.clone(), batch)
        total.backward()
    assert leaf.grad is not None and not any(x.requires_grad for x in metrics.values())
    return Found(read, total.detach(), {name: x.item() for name, x in metrics.items()}, leaf.grad)


@pytest.mark.parametrize("chunk", (1, 1 << 20), ids=("row by row", "at once"))
@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize(("world", "vocab"), [(1, 10), (2, 10), (2, 9), (2, 1)])
def test_policy_loss_metrics_and_gradient(groups, world, vocab, temperature, chunk):
    """9 over 2: a padded column; 1 over 2: a shard made of padding only."""
    logits, batch = case(vocab)
    logits.requires_grad_()
    expected = policy_oracle(logits, batch, 0.2, temperature)
    expected.loss.backward()
    labels = batch.labels.clamp_min(0)[:, None]
    log_p = (logits.detach() / temperature).log_softmax(1).gather(1, labels)[:, 0].masked_fill(batch.labels < 0, 0)
    answers = groups[world].run(on_shards, vocab, 1.0, temperature, chunk)
    for found in answers:
        torch.testing.assert_close(found.log_probs, log_p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-12, atol=1e-12)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-11, abs=1e-11)
        assert found.metrics == answers[0].metrics and torch.equal(found.loss, answers[0].loss)
    grads = torch.cat([found.grad for found in answers], 1)
    torch.testing.assert_close(grads[:, :vocab], logits.grad, rtol=1e-11, atol=1e-12)
    assert not grads[:, vocab:].any()
    if vocab == 10 and temperature == 1:
        assert 0 < expected.metrics["clip_fraction"] < batch.count  # the case has tokens on both sides of the clip


@pytest.mark.parametrize("world", (1, 2))
def test_logits_a_thousand_times_as_large(groups, world):
    logits, _ = case(9, 1000.0)
    for found in groups[world].run(on_shards, 9, 1000.0, 1.0, 1 << 20):
        assert math.isfinite(found.loss) and found.grad.isfinite().all()
        p = logits.softmax(1)[torch.arange(TOKENS) % 3 != 0]
        assert found.metrics["entropy"] == pytest.approx(torch.special.entr(p).sum().item(), rel=1e-9, abs=1e-12)


def test_entropy_leaves_its_logits_alone_and_widens_bfloat16():
    logits = draw(5, 100, seed=3).bfloat16()
    before = logits.clone()
    found = entropy(logits, 97, ONE)
    expected = torch.special.entr(logits[:, :97].double().softmax(1)).sum(1)
    assert found.dtype == torch.float32 and torch.equal(logits, before)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy(torch.zeros(2, 8), 8, ONE), torch.full((2,), math.log(8)))


@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_the_first_ratio_is_exactly_one(dtype, temperature):
    logits, batch = case(33, 4.0)
    logits = logits.to(dtype)
    old = TokenLogProbs(33, ONE, temperature)(logits.clone(), batch)
    assert old.dtype == torch.float32 and not old[batch.labels == IGNORE].any()
    advantages = batch.extras["advantages"].float()
    first = batch_of(batch.labels, old_log_probs=old, advantages=advantages)
    total, metrics = PolicyLoss(33, ONE, temperature=temperature)(logits.clone(), first)
    assert metrics["ratio"].item() == batch.count
    assert metrics["clip_fraction"].item() == metrics["approx_kl"].item() == 0
    assert total.item() == pytest.approx(-advantages.sum().item(), rel=1e-6)
    other = 1.7 - temperature  # log-probabilities read at another temperature than the loss's
    assert PolicyLoss(33, ONE, temperature=other)(logits.clone(), first)[1]["ratio"].item() != batch.count


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "learns"),
    [
        (1.0, 1.5, -1.2, False),
        (1.0, 0.5, -0.5, True),
        (-1.0, 1.5, 1.5, True),
        (-1.0, 0.5, 0.8, False),
        (2.0, 1.1, -2.2, True),
        (0.0, 3.0, 0.0, False),
    ],
)
def test_clipping_by_hand(advantage, ratio, expected, learns):
    logits = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    old = logits.detach().log_softmax(1)[:, 0] - math.log(ratio)
    batch = batch_of(torch.tensor([0]), old_log_probs=old, advantages=torch.tensor([advantage]).double())
    total, metrics = PolicyLoss(2, ONE)(logits.clone(), batch)
    total.backward()
    assert total.item() == pytest.approx(expected, rel=1e-12) and metrics["ratio"].item() == pytest.approx(ratio)
    assert bool(logits.grad.any()) == learns
    assert metrics["clip_fraction"].item() == (not learns and advantage != 0)


def test_approximate_kl_has_the_exact_one_as_its_expectation():
    """Over all answers of a vocabulary of three, weighted by the policy that sampled them: KL(old || new)."""
    old, new = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5]], dtype=torch.float64)
    expected, backwards = ((p * (p / q).log()).sum().item() for p, q in ((old, new), (new, old)))
    found = 0.0
    for label, p in enumerate(old):
        batch = batch_of(torch.tensor([label]), old_log_probs=p.log()[None], advantages=torch.zeros(1).double())
        each = PolicyLoss(3, ONE)(new.log()[None].clone(), batch)[1]["approx_kl"]
        assert each >= 0
        found += (p * each).item()
    assert found == pytest.approx(expected, rel=1e-12) and abs(expected - backwards) > 0.1


def test_prompt_tokens_change_nothing():
    logits, batch = case(10)
    total, metrics = PolicyLoss(10, ONE)(logits.clone(), batch)
    logits[batch.labels == IGNORE] *= -5
    again, same = PolicyLoss(10, ONE)(logits.clone(), batch)
    assert torch.equal(total, again) and metrics == same
    nothing = batch_of(torch.full((4,), IGNORE), old_log_probs=torch.zeros(4), advantages=torch.zeros(4))
    leaf = torch.ones(4, 10, requires_grad=True)
    empty, sums = PolicyLoss(10, ONE)(leaf.clone(), nothing)
    empty.backward()
    assert empty == 0 and not leaf.grad.any() and all(x == 0 for x in sums.values())


def test_behind_the_real_head():
    """The division by the temperature writes over the head's output: its weight's gradient must not notice."""
    head = VocabHead("lm_head.weight", 10, 6, ONE, WeightGrads()).double()
    with torch.no_grad():
        head.weight.copy_(draw(10, 6, seed=4))
    x, weight = draw(TOKENS, 6, seed=5).requires_grad_(), head.weight.detach().clone().requires_grad_()
    _, batch = case(10)
    PolicyLoss(10, ONE, temperature=0.7)(head(x), batch)[0].backward()
    other = x.detach().clone().requires_grad_()
    policy_oracle(other @ weight.t(), batch, 0.2, 0.7).loss.backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(head.weight.grad, weight.grad, rtol=1e-11, atol=1e-12)


def test_losses_can_be_told_apart():
    """The trainer keeps what it knows of a loss by its value."""
    assert hash(PolicyLoss(9, ONE)) == hash(PolicyLoss(9, ONE)) and PolicyLoss(9, ONE) != PolicyLoss(9, ONE, 0.1)
    assert len({ValueLoss(), ValueLoss(0.2), ValueLoss(0.3)}) == 2


def value_case() -> tuple[Tensor, Batch]:
    values, masked = draw(TOKENS, 1, seed=6), torch.arange(TOKENS) % 3 == 0
    labels = torch.ones(TOKENS, dtype=torch.int64).masked_fill(masked, IGNORE)
    extras = {"old_values": values[:, 0] + 0.3 * draw(TOKENS, seed=7), "returns": draw(TOKENS, seed=8)}
    return values, batch_of(labels, **{name: x.masked_fill(masked, 0) for name, x in extras.items()})


@pytest.mark.parametrize("clip", (0.2, math.inf))
def test_value_loss_against_a_loop(clip):
    values, batch = value_case()
    leaf, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    total, metrics = ValueLoss(clip)(leaf, batch)
    total.backward()
    expected, frozen = torch.zeros((), dtype=torch.float64), 0
    kept = [t for t in range(TOKENS) if batch.labels[t] != IGNORE]
    for t in kept:
        old, goal = batch.extras["old_values"][t], batch.extras["returns"][t]
        near = old + max(-clip, min(clip, (other[t, 0] - old).item())) if clip < math.inf else other[t, 0]
        free = (other[t, 0] - goal) ** 2
        inside = abs((other[t, 0] - old).item()) <= clip
        expected = expected + 0.5 * (free if inside else torch.max(free, (near - goal) ** 2))
        frozen += not inside and bool((near - goal) ** 2 > free)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert metrics["value_clip_fraction"].item() == frozen and (frozen > 0) == (clip < math.inf)
    means = {name: x.item() / batch.count for name, x in metrics.items()}
    v, r = values[kept, 0].numpy(), batch.extras["returns"][kept].numpy()
    assert means["value_mean"] == pytest.approx(v.mean()) and means["return_mean"] == pytest.approx(r.mean())
    assert explained_variance(means) == pytest.approx(1 - (r - v).var() / r.var(), rel=1e-9)
    assert not any(x.requires_grad for x in metrics.values())


def test_value_loss_by_hand():
    """A value that came 0.5 closer to its return counts 0.2 of that; one that moved away counts in full."""
    labels = torch.ones(2, dtype=torch.int64)
    batch = batch_of(labels, old_values=torch.tensor([0.0, 0.0]), returns=torch.tensor([1.0, 1.0]))
    total, metrics = ValueLoss(0.2)(torch.tensor([[0.5], [-0.5]]), batch)
    assert total.item() == pytest.approx(0.5 * (0.8**2 + 1.5**2))
    assert metrics["value_clip_fraction"].item() == 1


def test_value_gradcheck_precision_and_perfect_or_constant_critics():
    values, batch = value_case()
    assert torch.autograd.gradcheck(lambda x: ValueLoss()(x, batch)[0], (values.requires_grad_(),))
    narrow = batch_of(batch.labels, **{name: x.float() for name, x in batch.extras.items()})
    assert ValueLoss()(values.detach().bfloat16(), narrow)[0].dtype == torch.float32
    for critic, expected in ((batch.extras["returns"][:, None], 1.0), (torch.full((TOKENS, 1), 9.0).double(), 0.0)):
        means = {name: x.item() / batch.count for name, x in ValueLoss()(critic, batch)[1].items()}
        assert explained_variance(means) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(
        explained_variance({"return_mean": 2.0, "return_square": 4.0, "value_error": 1.0, "value_mean": 1.0})
    )


EOS, STEPS, WORDS, PROMPTS = 0, 3, 5, 4


class Answers(NamedTuple):
    """Answers to one batch of prompts: flat over their tokens, each known by the state (row of a table) it left."""

    prompts: Tensor
    states: Tensor
    actions: Tensor
    bounds: tuple[int, ...]


def sample(table: Tensor, rows: int, random: torch.Generator) -> Answers:
    """Answers of up to STEPS words of a policy whose logits are rows of `table`: one for (prompt, step, last word)."""
    prompts = torch.arange(rows) % PROMPTS
    last, live = torch.zeros_like(prompts), torch.ones_like(prompts, dtype=torch.bool)
    states, actions, taken = [], [], []
    for step in range(STEPS):
        state = (prompts * STEPS + step) * WORDS + last
        last = torch.multinomial(table[state].softmax(1), 1, generator=random)[:, 0]
        states.append(state), actions.append(last), taken.append(live)
        live = live & (last != EOS)
    mask = torch.stack(taken, 1)
    flat = [torch.stack(columns, 1)[mask] for columns in (states, actions)]
    return Answers(prompts, *flat, (0, *mask.sum(1).cumsum(0).tolist()))


def half_and_half(answers: Answers) -> Tensor:
    """Half a point for the prompt's own word in front, half for ending right behind it. At most 1."""
    bounds = torch.tensor(answers.bounds)
    first, ends = answers.actions[bounds[:-1]], bounds[1:] - 1
    ended = (bounds.diff() == 2) & (answers.actions[ends] == EOS)
    return 0.5 * (first == answers.prompts + 1) + 0.5 * ended


def ppo(beta: float, iterations: int, score: Callable[[Answers], Tensor], scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Table of the policy after PPO from the uniform one, which is its reference too."""
    random = torch.Generator().manual_seed(0)
    policy, critic = torch.zeros(PROMPTS * STEPS * WORDS, WORDS), torch.zeros(PROMPTS * STEPS * WORDS, 1)
    reference = policy.clone()
    optimizers = [torch.optim.Adam([x.requires_grad_()], lr=0.05) for x in (policy, critic)]
    trained = list(zip((policy, critic), optimizers, (PolicyLoss(WORDS, ONE), ValueLoss()), strict=True))
    read = TokenLogProbs(WORDS, ONE)
    for _ in range(iterations):
        with torch.no_grad():
            answers = sample(policy, 128, random)
            plain = batch_of(answers.actions)
            old, base = read(policy[answers.states], plain), read(reference[answers.states], plain)
            values = critic[answers.states, 0]
            rewards = token_rewards(scale(score(answers)), old, base, answers.bounds, beta)
            advantages, returns = gae(rewards, values, answers.bounds, 1.0, 0.95)
            advantages = whiten_by(advantages, moments(advantages))
        extras = {"old_log_probs": old, "advantages": advantages, "old_values": values, "returns": returns}
        cut = answers.bounds[64]
        for part in (slice(0, cut), slice(cut, None)):  # one gradient step a mini-batch
            micro = batch_of(answers.actions[part], **{name: x[part] for name, x in extras.items()})
            for model, optimizer, objective in trained:
                optimizer.zero_grad()
                (objective(model[answers.states[part]], micro)[0] / micro.count).backward()
                optimizer.step()
    return policy.detach()


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "lowest", "highest"), [(0.01, 0.95, 1.0), (20.0, 0.1, 0.25)])
def test_a_small_beta_finds_the_best_answers_and_a_huge_one_stays(beta, lowest, highest):
    """The uniform policy has 0.5 / 5 + 0.5 * 4/5 * 1/5 = 0.18 of the 1.0 that there is to win."""
    policy = ppo(beta, 120, half_and_half, whiten)
    reward = half_and_half(sample(policy, 4096, torch.Generator().manual_seed(1))).mean().item()
    assert lowest <= reward <= highest


@pytest.mark.slow
def test_the_policy_settles_at_the_known_optimum_of_the_penalised_reward():
    """max E[score] - beta KL(pi || uniform) is solved by pi ~ exp(score / beta), here over the first word: no other has
    a say in the score, so all others stay uniform. The penalty's sign, its size and its place all enter."""
    beta, points = 0.5, torch.tensor([0.5, 0.0, 1.0, -0.5, 0.25])

    def score(answers: Answers) -> Tensor:
        return points[answers.actions[torch.tensor(answers.bounds[:-1])]]

    policy = ppo(beta, 400, score, lambda scores: scores).view(PROMPTS, STEPS, WORDS, WORDS)
    expected = (points / beta).softmax(0)
    found = policy[:, 0, 0].softmax(1).mean(0)
    assert (found - expected).abs().sum() / 2 < 0.05
    assert (found - torch.full((WORDS,), 0.2)).abs().sum() / 2 > 0.2
