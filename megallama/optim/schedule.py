"""The learning rate of each step."""

from __future__ import annotations

import math

from megallama.config import OptimConfig


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SHAPES = {"cosine": _cosine, "constant": _constant}
"""Share of the way from the lowest to the peak rate, by the share of the steps after warm-up that are done."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Rate of step `step` = 1 … steps: linear warm-up that reaches the peak at step warmup_steps (or after warmup_share
    of all steps, if that is later), then the schedule, which reaches lr * min_lr_ratio at the last step (Llama 2 paper,
    section 2.2)."""
    warmup = max(optim.warmup_steps, math.ceil(optim.warmup_share * steps))
    if step < warmup:
        return optim.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    share = SHAPES[optim.schedule](progress)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
