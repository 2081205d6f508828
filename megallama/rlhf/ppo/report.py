"""What an iteration of PPO tells about itself, by its keys in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megallama.parallel.collectives import all_reduce
from megallama.rlhf.judges import Scores
from megallama.rlhf.ppo.losses import explained_variance
from megallama.rlhf.ppo.rollout import Answered
from megallama.runtime.mesh import Mesh
from megallama.train.trainer import Stats

DECILES = 10


def sums_over_replicas(values: Sequence[float], mesh: Mesh) -> list[float]:
    """The sum over dp of each value. Collective."""
    own = torch.tensor(list(values), dtype=torch.float64, device=mesh.device)
    return all_reduce(own, mesh.dp).tolist()


def mean(stats: Sequence[Stats], name: str) -> float:
    """Mean of a loss's metric over the answer tokens of several gradient steps."""
    return sum(s.metrics[name] * s.valid for s in stats) / sum(s.valid for s in stats)


def update_report(policy: Sequence[Stats], values: Sequence[Stats]) -> dict[str, float]:
    """Of the gradient steps of actor and critic."""
    tokens = sum(s.valid for s in policy)
    parts = ("value_mean", "value_error", "return_mean", "return_square")
    return {
        "loss": sum(s.loss * s.valid for s in policy) / tokens,
        "value_loss": sum(s.loss * s.valid for s in values) / tokens,
        "lr": policy[-1].lr,
        "grad_norm": sum(s.grad_norm for s in policy) / len(policy),
        "value_grad_norm": sum(s.grad_norm for s in values) / len(values),
        **{name: mean(policy, name) for name in ("ratio", "clip_fraction", "approx_kl", "entropy")},
        "first_ratio": policy[0].metrics["ratio"],
        "value_clip_fraction": mean(values, "value_clip_fraction"),
        "explained_variance": explained_variance({name: mean(values, name) for name in parts}),
    }


def answer_report(answered: Answered, scores: Scores) -> dict[str, float]:
    """Of the answers and their scores: rewards are logits, and lengths count EOS."""
    lengths = answered.lengths()
    record = {
        "reward_mean": float(scores.combined.mean()),
        "reward_std": float(scores.combined.std(correction=0)),
        "helpfulness_mean": float(scores.helpfulness.mean()),
        "length_mean": sum(lengths) / len(lengths),
        "length_max": float(max(lengths)),
        "finished": sum(answered.finished) / len(lengths),
    }
    if scores.safety is not None:
        record["safety_mean"] = float(scores.safety.mean())
    return record | reward_by_length(lengths, scores.combined.tolist())


def reward_by_length(lengths: Sequence[int], rewards: Sequence[float]) -> dict[str, float]:
    """Mean reward of each tenth of the answers from the shortest to the longest: whether length is what is rewarded."""
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    found = {}
    for tenth in range(DECILES):
        part = order[len(order) * tenth // DECILES : len(order) * (tenth + 1) // DECILES]
        if part:
            found[f"reward_decile_{tenth + 1}"] = sum(rewards[n] for n in part) / len(part)
    return found
