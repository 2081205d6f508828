"""Reward models (Llama 2 paper, section 3.2.2): a scalar head learns which of two answers people prefer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from megallama.config import SCALAR, Config
from megallama.data import ChatFormat, Message, Pair, read_pairs
from megallama.data.rows import PairLoader, TokenPair
from megallama.runtime.mesh import Mesh
from megallama.train.loop import Task
from megallama.train.ranking import Judged, RankingLoss, accuracy_by_rating, margin_of
from megallama.train.run import of_weights, run_stage
from megallama.train.scoring import scores
from megallama.train.sources import (
    chat_format,
    dialogue_ids,
    epoch_order,
    named,
    open_sources,
    tokenised,
    with_steps,
)
from megallama.train.trainer import Trainer, empty_trainer

Test = tuple[list[Pair], list[TokenPair]]
"""Held-out pairs as records and as ids."""


def run(config: Config) -> int:
    """Train a reward model as `config` says; returns the exit code. Every rank of the launch calls it."""
    config = of_weights(config, "reward")
    config = replace(config, model=replace(config.model, head=SCALAR))
    return run_stage(config, reward_task, empty_trainer)


def reward_task(config: Config, mesh: Mesh) -> tuple[Config, Task]:
    """Read and tokenise the pairs. Collective.

    Raises:
        ValueError: a record is not valid, or its answers are equal once they are cut to data.seq_length.
    """
    form, reward, train = chat_format(config), config.reward, config.train
    sources = open_sources(reward.sources, reward.valid, read_pairs, config, "reward")
    longest = config.data.seq_length
    pairs = tokenised(sources.records, lambda part: encode(form, part, reward.margin, longest), mesh)
    shares = [source.share for source in reward.sources]
    order = [n for epoch in range(reward.epochs) for n in epoch_order(sources.sizes, shares, train.seed, epoch)]
    config = with_steps(config, len(order), "reward")
    tests = {
        name: (found, tokenised(found, lambda part: encode(form, part, reward.margin, longest), mesh))
        for name, found in sources.valid.items()
    }
    held = [pair for _, encoded in tests.values() for pair in encoded]
    valid = PairLoader(held, range(len(held)), mesh.tp.size) if held and train.valid_interval else None
    fingerprints = {"format": form.fingerprint(), **sources.files}
    notes = (f"{len(pairs)} pairs, {len(order)} over {reward.epochs} epochs; {len(held)} held out",)
    loader = PairLoader(pairs, order, mesh.tp.size)
    loss = RankingLoss(reward.safety_weight)
    most = train.valid_steps * train.global_batch_size  # as many as the loss is of; reward-eval judges all of them
    few = {name: (found[:most], encoded[:most]) for name, (found, encoded) in tests.items()}
    return config, Task(loss, loader, valid, fingerprints, "reward", notes, partial(report, tests=few))


def encode(form: ChatFormat, pairs: Sequence[Pair], margin: str, longest: int) -> list[TokenPair]:
    """Pairs as ids; what is beyond `longest` is cut off.

    Raises:
        ValueError: nothing that tells a pair's answers apart is left; names file and line.
    """
    answers = [
        (pair.origin, (*pair.prompt, Message("assistant", text)))
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]
    rows = iter(dialogue_ids(form, answers))
    return [_cut(pair, next(rows).ids, next(rows).ids, margin, longest) for pair in pairs]


def _cut(pair: Pair, chosen: np.ndarray, rejected: np.ndarray, margin: str, longest: int) -> TokenPair:
    if np.array_equal(chosen[:longest], rejected[:longest]):
        raise ValueError(
            f"{pair.origin}: the chosen and the rejected answer are equal within data.seq_length={longest} tokens "
            f"(they have {len(chosen)} and {len(rejected)}); raise it, or remove the record"
        )
    safe = tuple(math.nan if flag is None else float(flag) for flag in (pair.chosen_is_safe, pair.rejected_is_safe))
    with named(pair.origin):
        by = margin_of(pair.rating, pair.margin, margin)
    return TokenPair(chosen[:longest], rejected[:longest], by, (safe[0], safe[1]))


def judge(trainer: Trainer, test: Test) -> list[Judged]:
    """How the reward model sees held-out pairs; the same on every rank. Collective."""
    records, pairs = test
    found = scores(trainer, [row for pair in pairs for row in (pair.chosen, pair.rejected)]).view(-1, 2)
    differences: Sequence[float] = (found[:, 0] - found[:, 1]).tolist()
    return [Judged(d, pair.rating, pair.source) for d, pair in zip(differences, records, strict=True)]


def report(trainer: Trainer, tests: dict[str, Test]) -> dict[str, float]:
    """Held-out accuracy, of all these pairs and by rating, for metrics.jsonl. Collective."""
    judged = [found for test in tests.values() for found in judge(trainer, test)]
    return {f"valid_accuracy_{rating}": accuracy for rating, (accuracy, _) in accuracy_by_rating(judged).items()}
