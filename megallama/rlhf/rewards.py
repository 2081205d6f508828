"""From the scores of two reward models to the reward of each answer token (Llama 2 paper, section 3.2.3).

    R_c = R_s where the prompt is tagged safety or R_s < 0.15, else R_h
    R   = whiten(logit(R_c)) - beta * KL(policy || reference)

The paper's R are behind a sigmoid. A reward model's head gives the logit itself, and all is done on logits: in fp32 a
sigmoid is 1 from 17 on, and what it has swallowed no logit brings back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megallama.rlhf.advantages import moments, row_ends, whiten_by


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


def whiten(x: Tensor) -> Tensor:
    """(n,) scores of the *global* batch, which the caller has gathered over dp -> mean 0, standard deviation 1.

    The deviation is the population's. Scores that are all equal give exactly 0: they are taken relative to the first.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shifted = wide.double() - wide[:1].double()
    return whiten_by(shifted, moments(shifted)).to(wide.dtype)


def token_rewards(scores: Tensor, log_probs: Tensor, reference: Tensor, bounds: Sequence[int], beta: float) -> Tensor:
    """Reward of each answer token: -beta * (log pi - log pi_ref) there, and the score on the row's last token.

    The last token is EOS where the answer has ended, else the token at which it was cut off; a row's tokens are those
    up to and with EOS. Summed over a row, this is score - beta * (log pi(g|p) - log pi_ref(g|p)), whose expectation
    over the policy's own answers is R(g|p) of the paper.

    Args:
        scores: (n,) one for each row, whitened.
        log_probs, reference: (N,) log-probabilities of the answer tokens under the policy that sampled them and under
            the reference.
        bounds: 0 = b0 < b1 < … < bn = N, the rows.

    Raises:
        ValueError: a row is empty.
    """
    wide = torch.promote_types(torch.promote_types(scores.dtype, log_probs.dtype), torch.float32)
    rewards = -beta * (log_probs.to(wide) - reference.to(wide))
    rewards[row_ends(bounds, rewards)] += scores.to(wide)
    return rewards
