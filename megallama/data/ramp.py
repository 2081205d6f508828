"""Which samples each step takes: constant global batches, or a ramp that grows them."""

from __future__ import annotations


class BatchPlan:
    """step -> (first global sample, samples of the step), in O(levels of the ramp).

    The ramp has one level for each size start, start + increment, … below `size`; each level lasts for an equal share
    of `samples`, rounded up to whole steps.

    Args:
        size: samples a step once the ramp is over.
        start, increment: first size and growth of the ramp; start = size means none.
        samples: samples over which the ramp extends.
    """

    def __init__(self, size: int, start: int | None = None, increment: int = 1, samples: int = 0):
        sizes = range(size if start is None else start, size, increment)
        self._levels: list[tuple[int, int, int]] = []  # first step, first sample, samples a step
        step, sample = 1, 0
        for level in sizes:
            steps = -(-samples // (len(sizes) * level))
            self._levels.append((step, sample, level))
            step, sample = step + steps, sample + steps * level
        self._levels.append((step, sample, size))

    def __call__(self, step: int) -> tuple[int, int]:
        first_step, first_sample, size = next(level for level in reversed(self._levels) if level[0] <= step)
        return first_sample + (step - first_step) * size, size
