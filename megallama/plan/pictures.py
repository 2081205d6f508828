"""Pictures of a planned step, as PNG: the pipeline's timeline, memory over time, predicted scaling.

Each has a function that builds the figure and one that writes it. matplotlib is imported where it draws, so that
`import megallama.plan` stays quick.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megallama.files import whole
from megallama.plan.report import GIB
from megallama.plan.timeline import INK, Timeline, time_unit, timeline_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT, GRID, LINE = "#8a93a0", "#e3e6ea", "#2866a8"
SCALING = (9.0, 6.5)
"""Inches of the picture of scaling."""
LETTERS = 46
"""In a line about a layout."""


class ScalingPoint(NamedTuple):
    """The predicted throughput of the best layout on so many GPUs."""

    gpus: int
    tokens_per_second: float
    layout: str


def timeline(step: Timeline, path: Path) -> None:
    """One row a pipeline rank: what it computes, when it idles, what it sends, and what follows the pipeline.

    Raises:
        ValueError: there are no events, or not as many times of recomputation as stages.
    """
    _save(timeline_figure(step), path)


def memory(series: Sequence[Sequence[tuple[float, float]]], limit_gib: float, path: Path) -> None:
    """Bytes over time of each pipeline rank, with the limit.

    Args:
        series: for each rank, (seconds, bytes from then on) by time.
        limit_gib: memory of one GPU, or what of it may be used.
        path: of the PNG.

    Raises:
        ValueError: a rank has no values.
    """
    _save(memory_figure(series, limit_gib), path)


def memory_figure(series: Sequence[Sequence[tuple[float, float]]], limit_gib: float) -> Figure:
    """The figure of `memory`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not series or not all(series):
        raise ValueError("the picture of memory needs at least one (seconds, bytes) for every rank")
    peaks = [max(held for _, held in row) / GIB for row in series]
    end = max(row[-1][0] for row in series)
    factor, unit = time_unit(end)
    figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for rank, row in enumerate(series):
        times, held = [time for time, _ in row], [held / GIB for _, held in row]
        label = f"rank {rank}, peak {peaks[rank]:.2f} GiB"
        colour = colormaps["viridis"](0.92 * rank / max(len(series) - 1, 1))
        axes.step([*times, end], [*held, held[-1]], where="post", color=colour, linewidth=1.2, label=label)
    axes.axhline(limit_gib, color="#b3261e", linestyle="--", label=f"limit {limit_gib:g} GiB")
    most = max(peaks)
    verdict = f"{abs(most - limit_gib):.2f} GiB {'over' if most > limit_gib else 'below'} the limit"
    title = f"memory    peak {most:.2f} GiB on rank {peaks.index(most)}, {verdict}"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set(xlim=(0, end or 1), ylim=(0, 1.08 * max(limit_gib, most)))
    axes.set(xlabel=f"time ({unit})", ylabel="memory (GiB)")
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds * factor:.6g}")
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=INK)
    return figure


def scaling(points: Sequence[ScalingPoint], path: Path) -> None:
    """Predicted throughput over GPUs beside an ideal that starts at the fewest, and the efficiency against it.

    Raises:
        ValueError: there are no points, or one of them has no GPUs or no throughput.
    """
    _save(scaling_figure(points), path)


def scaling_figure(points: Sequence[ScalingPoint]) -> Figure:
    """The figure of `scaling`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    for count, rate, layout in points:
        if count < 1 or rate <= 0:
            raise ValueError(f"{layout!r} with {rate:g} tokens a second on {count} GPUs has no place on a log scale")
    if not points:
        raise ValueError("the picture of scaling needs at least one number of GPUs")
    points = sorted(points)
    gpus = [point.gpus for point in points]
    rates = [point.tokens_per_second for point in points]
    ideal = [rates[0] / gpus[0] * count for count in gpus]
    efficiency = [100 * rate / best for rate, best in zip(rates, ideal, strict=True)]
    figure = Figure(figsize=SCALING, facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.09, top=0.93, hspace=0.08)
    upper.loglog(gpus, ideal, color=FAINT, linestyle="--", linewidth=1.2, label="ideal")
    upper.loglog(gpus, rates, "o-", color=LINE, linewidth=1.8, markersize=5, label="predicted")
    lower.semilogx(gpus, efficiency, "o-", color=LINE, linewidth=1.8, markersize=5)
    lower.axhline(100, color=FAINT, linestyle="--", linewidth=1.2)
    lower.set(xlabel="GPUs", ylabel="efficiency (%)", ylim=(0, max(110.0, 1.1 * max(efficiency))))
    upper.set_ylabel("tokens a second")
    upper.set_title(f"predicted scaling from {gpus[0]} to {gpus[-1]} GPUs", loc="left", fontsize=11, color=INK)
    upper.legend(loc="upper left", frameon=False, labelcolor=INK)
    for axes in (upper, lower):
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter(EngFormatter())
    _annotate(upper, points)
    first, last = (math.log(limit) for limit in upper.get_xlim())
    ticks: list[int] = []
    for count in gpus[::-1]:  # as many as have room
        if not ticks or math.log(ticks[-1] / count) / (last - first) > 0.06:
            ticks.append(count)
    lower.set_xticks(ticks, [str(count) for count in ticks])
    return figure


def _annotate(axes: Axes, points: list[ScalingPoint]) -> None:
    """Each point's layout to its lower right: limits that leave room for the text, and no two lines on one another."""
    size, away, line = 8.0, 9.0, 11.0  # points
    box = axes.get_position()
    wide, high = 72 * SCALING[0] * box.width, 72 * SCALING[1] * box.height
    texts = [textwrap.wrap(point.layout, LETTERS, break_on_hyphens=False) or [""] for point in points]
    x, y = ([math.log(value) for value in values] for values in list(zip(*points, strict=True))[:2])
    first = x[0] - 0.06 * max(x[-1] - x[0], 1.0)
    needed = [away + 0.56 * size * (2 + max(map(len, lines))) for lines in texts]  # digits are wider
    last = max(first + (at - first) / (1 - min(room / wide, 0.6)) for at, room in zip(x, needed, strict=True))
    low, top = min(y), max(*y, y[0] + x[-1] - x[0])
    low, top = low - 0.2 * max(top - low, 1.0), top + 0.06 * max(top - low, 1.0)
    axes.set(xlim=(math.exp(first), math.exp(last)), ylim=(math.exp(low), math.exp(top)))
    free = high
    for at, point, lines in list(zip(y, points, texts, strict=True))[::-1]:
        place = (at - low) / (top - low) * high
        free = min(place - away + line / 2, free)
        axes.annotate(
            "\n".join(lines),
            point[:2],
            (away, free - place),
            textcoords="offset points",
            fontsize=size,
            color=INK,
            va="top",
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )
        free -= line * len(lines)


def _save(figure: Figure, path: Path) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
