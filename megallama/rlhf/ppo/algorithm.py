"""Proximal policy optimisation (Llama 2 paper, section 3.2.3; Schulman et al. 2017).

An iteration: sample answers with the actor in its generation layout, score them, compute rewards, values and
advantages, then one gradient step a mini-batch for the actor and for the critic. Every rank knows all answers and all
scores, so whitening is over the global batch by construction; token-wise tensors stay with the replica of their row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from megallama.config import Config
from megallama.data.batch import Batch
from megallama.data.tokenizer import Tokenizer
from megallama.inference.generator import Generator
from megallama.inference.sampling import Sampling
from megallama.pipeline.engine import Loss, Read
from megallama.rlhf.judges import Scores
from megallama.rlhf.ppo.losses import PolicyLoss, TokenLogProbs, ValueLoss
from megallama.rlhf.ppo.models import Models
from megallama.rlhf.ppo.report import answer_report, sums_over_replicas, update_report
from megallama.rlhf.ppo.rewards import whiten
from megallama.rlhf.ppo.rollout import (
    Answered,
    Micro,
    estimate_advantages,
    kl_of_rows,
    micro_batch,
    prompt_numbers,
    replica_rows,
    requests_of,
    seeds_of,
    with_answers,
)
from megallama.rlhf.prompts import TokenPrompt
from megallama.runtime.progress import Watch, unwatched
from megallama.train.trainer import Stats, Trainer

VALID = 1 << 60
"""Numbers of held-out answers begin here, so that their seeds are nobody else's."""


class Experience(NamedTuple):
    """What one iteration has sampled.

    Attributes:
        answered, scores: of all rows, the same on every rank.
        micros: [mini-batch][micro-batch] of this replica.
    """

    answered: Answered
    scores: Scores
    micros: list[list[Micro]]


@dataclass
class Progressed:
    """Where a run stands; saved with it.

    Attributes:
        iteration: the last one done.
        best: highest held-out reward so far, nan before the first.
        best_iteration: when that was.
        stale: validations since.
        bad: consecutive iterations in which a gradient was not finite.
    """

    iteration: int = 0
    best: float = math.nan
    best_iteration: int = 0
    stale: int = 0
    bad: int = 0


class Ppo:
    """The algorithm over its models. All calls are collective.

    Args:
        config: train.steps in iterations.
        prompts, valid: to learn from, and held out (may be none).
    """

    def __init__(
        self,
        config: Config,
        models: Models,
        tokenizer: Tokenizer,
        prompts: Sequence[TokenPrompt],
        valid: Sequence[TokenPrompt],
    ):
        self.config, self.models, self.tokenizer = config, models, tokenizer
        self.prompts, self.valid = prompts, valid
        ppo, actor = config.ppo, models.actor
        self.mesh, vocab, tp = actor.mesh, actor.config.model.vocab_size, actor.mesh.tp
        self.sampling = Sampling(ppo.max_new_tokens, ppo.temperature)
        self.log_probs = TokenLogProbs(vocab, tp, ppo.temperature)
        self.policy_loss = PolicyLoss(vocab, tp, ppo.clip, ppo.temperature)
        self.value_loss = ValueLoss(ppo.value_clip or math.inf)
        self.watch: Watch = unwatched  # of the sampling, which takes most of an iteration

    def iterate(self, iteration: int, stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, Any], bool, bool]:
        """One iteration; returns (its record, some gradient was not finite, somebody asked to stop).

        Args:
            stop: whether this rank has been asked to stop; looked at in each gradient step, after which all ranks know.

        Raises:
            ValueError: a score or logits are not finite; no weight has changed then.
        """
        start = time.perf_counter()
        answered = self._sample(iteration)
        sampled = time.perf_counter()
        scores = self._score(answered)
        experience = self._experience(answered, scores)
        scored = time.perf_counter()
        policy = self._train(self.models.actor, experience, self.policy_loss, ("old_log_probs", "advantages"), stop)
        values = self._train(self.models.critic, experience, self.value_loss, ("old_values", "returns"), stop)
        end = time.perf_counter()
        seconds = {
            "step_seconds": end - start,
            "generate_seconds": sampled - start,
            "score_seconds": scored - sampled,
            "train_seconds": end - scored,
        }
        record = update_report(policy, values) | answer_report(answered, scores) | self._gaps(experience) | seconds
        record["tokens_per_second"] = sum(map(len, answered.rows)) / (end - start)
        skipped = any(stats.skipped for stats in (*policy, *values))
        return record, skipped, any(stats.stop for stats in (*policy, *values))

    def _sample(self, iteration: int) -> Answered:
        size = self.config.ppo.rollouts
        first = (iteration - 1) * size
        taken = prompt_numbers(len(self.prompts), first, size, self.config.train.seed)
        return self._answer([self.prompts[n] for n in taken], list(range(first, first + size)))

    def _answer(self, prompts: Sequence[TokenPrompt], numbers: Sequence[int]) -> Answered:
        """Answers by the actor as it is now; `numbers` of the answers in the run decide their seeds."""
        models, config = self.models, self.config
        with models.reading(models.actor), models.consolidation.gathered() as generating:
            generator = Generator(generating, self.tokenizer, config.generate.rows)
            seeds = seeds_of(config.train.seed, numbers)
            requests = requests_of(prompts, self.sampling, config.data.seq_length, seeds)
            return with_answers(prompts, generator.run(requests, watch=self.watch))

    def _score(self, answered: Answered) -> Scores:
        return self.models.judges(answered.rows, [prompt.record.is_safety for prompt in answered.prompts])

    def _experience(self, answered: Answered, scores: Scores) -> Experience:
        train, mesh, models = self.config.train, self.mesh, self.models
        plan = replica_rows(len(answered.rows), train.global_batch_size, train.micro_batch_size, mesh.dp)
        micros = [[micro_batch(answered, rows, mesh.tp.size) for rows in group] for group in plan]
        mine = list(chain.from_iterable(micros))
        for micro, old, reference, values in zip(
            mine,
            self._read(models.actor, mine, self.log_probs),
            self._read(models.reference, mine, self.log_probs),
            self._read(models.critic, mine, _values),
            strict=True,
        ):
            micro.old, micro.reference, micro.values = old, reference, values
        estimate_advantages(mine, whiten(scores.combined), self.config.ppo, mesh)
        return Experience(answered, scores, micros)

    def _read(self, trainer: Trainer, micros: Sequence[Micro], read: Read) -> list[Tensor]:
        """(N,) of every micro-batch's answer tokens."""
        with self.models.reading(trainer):
            found = trainer.infer([micro.batch for micro in micros], read)
        return [micro.flat(tokenwise) for micro, tokenwise in zip(micros, found, strict=True)]

    def _train(
        self, trainer: Trainer, experience: Experience, loss: Loss, extras: tuple[str, str], stop: Callable[[], bool]
    ) -> list[Stats]:
        """One gradient step a mini-batch."""
        fields = {"old_log_probs": "old", "old_values": "values"}
        stats = []
        with self.models.training(trainer):
            for group in experience.micros:
                flat = [{name: getattr(micro, fields.get(name, name)) for name in extras} for micro in group]
                batches = [micro.with_extras(**tensors) for micro, tensors in zip(group, flat, strict=True)]
                stats.append(trainer.step(batches, loss, stop()))
        return stats

    def _gaps(self, experience: Experience) -> dict[str, float]:
        """How far the policy is from the reference, and the generator's log-probabilities from the trainer's."""
        kl = gap = tokens = rows = 0.0
        for micro in chain.from_iterable(experience.micros):
            kl += sum(kl_of_rows(micro))
            rows += len(micro.rows)
            theirs = [p for n in micro.rows for p in experience.answered.log_probs[n]]
            gap += float((micro.old.double() - micro.old.new_tensor(theirs).double()).abs().sum())
            tokens += len(theirs)
        kl, gap, tokens, rows = sums_over_replicas([kl, gap, tokens, rows], self.mesh)
        return {"kl": kl / rows, "kl_per_token": kl / tokens, "generator_gap": gap / tokens}

    def validate(self) -> tuple[dict[str, float], Answered, Scores]:
        """Answers to the held-out prompts, always with the same seeds, and their mean scores."""
        answered = self._answer(self.valid, [VALID + n for n in range(len(self.valid))])
        scores = self._score(answered)
        record = {
            "valid_reward": float(scores.combined.mean()),
            "valid_helpfulness": float(scores.helpfulness.mean()),
            "valid_length": sum(answered.lengths()) / len(answered.rows),
            "valid_finished": sum(answered.finished) / len(answered.rows),
        }
        if scores.safety is not None:
            record["valid_safety"] = float(scores.safety.mean())
        if self.models.watch is not None:
            record["valid_watch"] = float(self.models.watch(answered.rows).mean())
        return record, answered, scores


def _values(output: Tensor, batch: Batch) -> Tensor:
    """An engine read: the critic's value at every place."""
    return output[:, 0]
