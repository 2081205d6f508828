"""The reward models that score answers in rejection sampling and PPO, and how two scores become one.

    R_c = R_s where the prompt is tagged safety or R_s < 0.15, else R_h          (Llama 2 paper, section 3.2.3)

The paper's R are behind a sigmoid. A reward model's head gives the logit itself, and all is done on logits: in fp32 a
sigmoid is 1 from 17 on, and what it has swallowed no logit brings back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megallama.checkpoint.formats import Source
from megallama.config import SCALAR, Config
from megallama.runtime.mesh import Mesh
from megallama.train.models import adopt, frozen, mesh_for, open_weights
from megallama.train.residence import Residence
from megallama.train.scoring import scores
from megallama.train.trainer import Trainer


def logit(probability: float) -> float:
    """Inverse of the sigmoid.

    Raises:
        ValueError: not between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(
            f"the safety threshold is a probability between 0 and 1, not {probability}; the paper's is 0.15"
        )
    return math.log(probability / (1 - probability))


SAFETY_LOGIT = logit(0.15)
"""-1.7346…: the paper's threshold as a reward model's raw score."""


def combined(helpfulness: Tensor, safety: Tensor | None, is_safety: Tensor, threshold: float = 0.15) -> Tensor:
    """logit(R_c) of each answer: the safety score where it must decide, elsewhere the helpfulness score.

    Args:
        helpfulness: (n,) raw scores.
        safety: (n,) raw scores, or None without a safety model: then helpfulness decides everywhere.
        is_safety: bool (n,), prompts tagged as safety prompts.
        threshold: probability of being safe below which the safety score decides; exactly at it, helpfulness does.
            The comparison is made in fp64, so no score is rounded onto the threshold.

    Returns:
        (n,) in at least fp32.

    Raises:
        ValueError: a score is not finite (says how many and which), or the threshold is no probability.
    """
    limit = logit(threshold)
    _check_finite("helpfulness", helpfulness)
    wide = torch.promote_types(helpfulness.dtype, torch.float32)
    if safety is None:
        return helpfulness.to(wide)
    _check_finite("safety", safety)
    return torch.where(is_safety | (safety.double() < limit), safety.to(wide), helpfulness.to(wide))


def _check_finite(model: str, scores: Tensor) -> None:
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        rows = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        raise ValueError(
            f"{len(bad)} of {scores.numel()} {model} scores are not finite (rows {rows}): "
            f"check the {model} model's checkpoint, and try train.dtype float32"
        )


class Scores(NamedTuple):
    """Scores of n answers as logits, fp64 on the CPU, equal on every rank.

    Attributes:
        helpfulness: (n,).
        safety: (n,), None without a safety model.
        combined: (n,), R_c of the paper as a logit.
    """

    helpfulness: Tensor
    safety: Tensor | None
    combined: Tensor


class Judge:
    """One frozen reward model on the mesh; it waits in host memory while it is not asked."""

    def __init__(self, trainer: Trainer):
        self.trainer, self._residence = trainer, Residence(trainer)

    def __call__(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Rows of prompt and answer as ids, EOS included -> (rows,) logits. Collective."""
        with self._residence.reading():
            return scores(self.trainer, rows)


def judge_source(name: str, config: Config, world: int, vocabulary: int) -> Source | None:
    """The weights of judges.`name`, None where there is no such judge; reads headers only.

    Args:
        config: without the policy's shape: a judge may have another one.
        world: number of ranks.
        vocabulary: the policy's; a judge must know all of its tokens.

    Raises:
        ValueError: the folder holds no reward model, or one that cannot run here.
    """
    path: str | None = getattr(config.judges, name)
    if path is None:
        return None
    source = open_weights(path)
    if source.model.head != SCALAR:
        raise ValueError(
            f"judges.{name}={path} is a language model, not a reward model; name the output_dir of stage reward"
        )
    try:
        adopt(config, source.model, source.folder).validate(world)
    except ValueError as error:
        raise ValueError(f"judges.{name}={path}: {error}") from None
    if source.model.vocab_size < vocabulary:
        raise ValueError(
            f"judges.{name}={path} has a vocabulary of {source.model.vocab_size}, the policy one of {vocabulary}; both "
            f"must know the same tokens"
        )
    return source


def open_judge(name: str, config: Config, mesh: Mesh, vocabulary: int) -> Judge | None:
    """The reward model judges.`name`, None where there is no such judge. Collective.

    Raises:
        ValueError: as `judge_source`.
    """
    source = judge_source(name, config, mesh.world.size, vocabulary)
    return Judge(frozen(config, mesh_for(source.model, mesh), source)) if source is not None else None


class Judges:
    """The helpfulness model and, where there is one, the safety model.

    Args:
        config: with its judges section, and without the policy's shape.
        vocabulary: the policy's.

    Raises:
        ValueError: judges.helpfulness is missing, or as `judge_source`.
    """

    def __init__(self, config: Config, mesh: Mesh, vocabulary: int):
        helpfulness = open_judge("helpfulness", config, mesh, vocabulary)
        if helpfulness is None:
            raise ValueError("judges.helpfulness is empty: name a reward model (the output_dir of stage reward)")
        self.threshold, self.helpfulness = config.judges.threshold, helpfulness
        self.safety = open_judge("safety", config, mesh, vocabulary)

    def __call__(self, rows: Sequence[np.ndarray], is_safety: Sequence[bool]) -> Scores:
        """Score rows of prompt and answer as ids. Collective.

        Raises:
            ValueError: a score is not finite; names the row.
        """
        helpful = self.helpfulness(rows)
        safe = self.safety(rows) if self.safety is not None else None
        tagged = torch.tensor(list(is_safety), dtype=torch.bool)
        return Scores(helpful, safe, combined(helpful, safe, tagged, self.threshold))
