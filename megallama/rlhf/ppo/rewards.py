"""From the judges' scores to the reward of each answer token: R = whiten(logit(R_c)) - beta * KL(policy || reference)
(Llama 2 paper, section 3.2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megallama.rlhf.ppo.advantages import moments, row_ends, whiten_by


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
