"""A bandit-like toy on the real stage: PPO finds the rewarded answers, and does not where the KL penalty forbids it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_world import World, config_of, make_world

from megallama.alignment import JudgesConfig, PpoConfig
from megallama.config import Config
from megallama.rlhf.judges import Scores
from megallama.rlhf.ppo.run import PpoRun
from megallama.runtime.mesh import Mesh

ANSWER = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("toy"))


def share_of_even_ids(run: PpoRun, rows: list) -> torch.Tensor:
    """The reward: 1 is the optimum, and a policy that knows nothing gets a half."""
    prompt = len(run.ppo.prompts[0].ids)
    return torch.tensor([float((row[prompt:] % 2 == 0).mean()) for row in rows], dtype=torch.float64)


def toy(world: World, beta: float) -> Config:
    config = config_of(world, f"toy-{beta}", dtype="float32")
    return replace(
        config,
        ppo=PpoConfig(prompts=str(world.prompts), rollouts=64, max_new_tokens=ANSWER, beta=beta, critic_lr=1e-2),
        judges=JudgesConfig(str(world.judges[0])),
        train=replace(config.train, steps=40, global_batch_size=32, micro_batch_size=32),
        optim=replace(config.optim, lr=3e-3, schedule="constant"),
    )


def rewards(world: World, beta: float, iterations: int) -> list[float]:
    run = PpoRun(toy(world, beta), Mesh())
    prompts = [p for p in run.ppo.prompts if len(p.ids) == len(run.ppo.prompts[0].ids)]
    assert len(prompts) > 2
    run.ppo.prompts = prompts

    def judges(rows, is_safety):
        found = share_of_even_ids(run, rows)
        return Scores(found, None, found)

    run.models.judges = judges  # type: ignore[assignment]
    return [run.ppo.iterate(iteration + 1)[0]["reward_mean"] for iteration in range(iterations)]


def test_ppo_reaches_the_optimum(world):
    seen = rewards(world, 0.01, 40)
    assert seen[0] < 0.65 and sum(seen[-3:]) / 3 >= 0.95, seen


def test_a_huge_kl_weight_keeps_the_policy_where_it_was(world):
    seen = rewards(world, 50.0, 20)
    assert sum(seen[-3:]) / 3 < 0.7, seen
