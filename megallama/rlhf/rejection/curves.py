"""How the best and the median of N sampled answers grow with N (the paper, figures 7 and 8), from K scored answers.

Both are expectations over all subsets of N of a prompt's K answers, without drawing any: the i-th smallest of the K is
the r-th smallest of N of them with probability C(i-1, r-1) C(K-i, N-r) / C(K, N). The best has r = N; the median of an
even N is the mean of the two in the middle.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HEADER = "temperature,n,max_mean,median_mean"


def order_statistic(k: int, n: int, r: int) -> np.ndarray:
    """(k,) probabilities: which of k sorted values is the r-th smallest of n of them, drawn without replacement.

    In logarithms, since C(k, n) has no float from k = 1030 on; they add up to 1 exactly up to rounding.
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, k + 1)))])  # of factorials

    def choose(above: np.ndarray, below: int) -> np.ndarray:
        return logs[above] - logs[below] - logs[above - below]

    below = np.arange(r - 1, k - n + r)  # values smaller than it: r - 1 of them are drawn, and n - r of the larger ones
    chances = np.exp(choose(below, r - 1) + choose(k - 1 - below, n - r) - choose(np.array(k), n))
    weights = np.zeros(k)
    weights[below] = chances / chances.sum()
    return weights


def rank_weights(k: int) -> np.ndarray:
    """(2, k, k): of k sorted scores, row n - 1 makes the expected maximum, or the median, of n of them."""
    largest = [order_statistic(k, n, n) for n in range(1, k + 1)]
    middle = [(order_statistic(k, n, (n + 1) // 2) + order_statistic(k, n, n // 2 + 1)) / 2 for n in range(1, k + 1)]
    return np.array([largest, middle])


class Curves:
    """Means over prompts, which are added one by one.

    Args:
        temperatures: at each of which a prompt has so many answers as
        samples: K.
    """

    def __init__(self, temperatures: Sequence[float], samples: int):
        self.temperatures, self.samples = tuple(temperatures), samples
        self._weights = rank_weights(samples)
        self._sums = np.zeros((2, len(self.temperatures), samples))
        self._prompts = 0

    def add(self, scores: np.ndarray) -> None:
        """One prompt's scores, (temperatures, K)."""
        self._sums += np.sort(scores, 1) @ self._weights.transpose(0, 2, 1)
        self._prompts += 1

    @property
    def means(self) -> np.ndarray:
        """(2, temperatures, K): expected maximum and median of 1 … K answers."""
        return self._sums / self._prompts

    def best(self) -> int:
        """Which temperature gives the best of K answers; the first of equals."""
        return int(self.means[0, :, -1].argmax())

    def table(self) -> str:
        """CSV."""
        largest, middle = self.means
        rows = [
            f"{temperature},{n + 1},{float(largest[t, n])!r},{float(middle[t, n])!r}"
            for t, temperature in enumerate(self.temperatures)
            for n in range(self.samples)
        ]
        return "\n".join([HEADER, *rows]) + "\n"

    def picture(self) -> bytes:
        """PNG: the maximum solid, the median dashed, a colour for each temperature."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draws = range(1, self.samples + 1)
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(self.temperatures)))
        largest, middle = self.means
        for t, temperature in enumerate(self.temperatures):
            axes.plot(draws, largest[t], ".-", color=colours[t], label=f"temperature {temperature:g}")
            axes.plot(draws, middle[t], ".--", color=colours[t])
        axes.plot([], [], "-", color="0.4", label="maximum")
        axes.plot([], [], "--", color="0.4", label="median")
        axes.set_title(f"reward among N answers, mean of {self._prompts} prompts", loc="left", fontsize=10)
        axes.set_xlabel("N", fontsize=9)
        axes.set_ylabel("reward (logit)", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
        return out.getvalue()
