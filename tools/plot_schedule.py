"""Draw the simulated timeline of pipeline schedules: one row a rank, one box an action, with its micro-batch's number.

python tools/plot_schedule.py --schedule 1f1b --pp 4 --micros 8 --output timeline.png
python tools/plot_schedule.py --schedule all --pp 4 --micros 8 --output timeline.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from megallama.pipeline import SCHEDULES, Event, Program, bubble, build, peak_activations, simulate

COLOURS = {"F": "#4c84c4", "B": "#e8a13c", "W": "#56a37c"}
LABELS = {"F": "forward", "B": "backward", "W": "weight gradient (where split off)"}
IDLE = "#eceef1"
INK = "#1d2733"
WIDTH, LEFT, RIGHT = 12, 0.06, 0.985  # of the picture in inches; of the axes as shares of it


def shade(kind: str, chunk: int) -> tuple[float, float, float]:
    """The kind's colour, paler for each later chunk of a rank."""
    towards_white = 1 - 0.72**chunk
    red, green, blue = (channel + (1 - channel) * towards_white for channel in to_rgb(COLOURS[kind]))
    return red, green, blue


def cost_of(program: Program, chunks: int, forward: float, backward: float, weight: float) -> dict[str, float]:
    """Time of each kind, when `forward` and `backward` are those of all chunks of a rank for one micro-batch."""
    split = any(action.kind == "W" for row in program for action in row)
    times = {"F": forward, "B": backward - weight if split else backward, "W": weight}
    return {kind: time / chunks for kind, time in times.items()}


def draw(axes: Axes, events: list[Event], ranks: int, inches: float) -> None:
    """Rank 0 on top; the grey ground that shows between the boxes is idle time. A unit of time is `inches` wide."""
    span = max(event.end for event in events)
    narrowest = min(event.end - event.start for event in events if event.end > event.start)
    points = 72 * inches * narrowest  # width of the narrowest box
    for rank in range(ranks):
        axes.add_patch(Rectangle((0, rank - 0.45), span, 0.9, facecolor=IDLE, edgecolor="none"))
    for (kind, stage, micro), rank, start, end in events:
        colour = shade(kind, stage // ranks)
        axes.add_patch(
            Rectangle(
                (start, rank - 0.45),
                end - start,
                0.9,
                facecolor=colour,
                edgecolor="white",
                linewidth=min(0.8, points / 12),
            )
        )
        if points >= 6:  # else the number would be too small to read
            size = min(9.0, 0.55 * points)
            axes.text((start + end) / 2, rank, str(micro), ha="center", va="center", fontsize=size, color=INK)
    axes.set(ylim=(ranks - 0.4, -0.6), yticks=range(ranks))
    axes.set_yticklabels([f"rank {rank}" for rank in range(ranks)], fontsize=9, color=INK)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)


def plot(schedules: dict[str, int], options: argparse.Namespace) -> None:
    """Simulate every schedule (name -> chunks a rank) and write one picture with a common time axis."""
    runs = []
    for name, chunks in schedules.items():
        program = build(name, options.pp, options.micros, chunks)
        cost = cost_of(program, chunks, options.forward, options.backward, options.weight)
        events = simulate(program, cost, options.hop)
        kept = max(peak_activations(program)) / chunks
        title = f"{name}{f', {chunks} chunks a rank' if chunks > 1 else ''}"
        runs.append((title, f"bubble {bubble(events, options.pp):.1%}   peak activations {kept:.3g}", events))
    until = max(event.end for _, _, events in runs for event in events)
    figure, grid = plt.subplots(
        len(runs), 1, squeeze=False, sharex=True, figsize=(WIDTH, len(runs) * (0.3 * options.pp + 0.55) + 0.75)
    )
    figure.subplots_adjust(left=LEFT, right=RIGHT, top=1 - 0.35 / figure.get_figheight(), hspace=0.4)
    figure.subplots_adjust(bottom=0.75 / figure.get_figheight())
    for axes, (title, numbers, events) in zip(grid[:, 0], runs, strict=True):
        draw(axes, events, options.pp, inches=WIDTH * (RIGHT - LEFT) / until)
        axes.set_xlim(0, until)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_title(numbers, loc="right", fontsize=10, color=INK)
    kinds = sorted({event.action.kind for _, _, events in runs for event in events}, key=list(COLOURS).index)
    grid[-1, 0].set_xlabel("time", fontsize=9, color=INK)
    figure.legend(
        handles=[*(Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in kinds), Patch(color=IDLE, label="idle")],
        loc="lower center",
        ncols=len(kinds) + 1,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(options.output, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="all", choices=[*SCHEDULES, "all"], help="default: all, for comparison")
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--micros", type=int, default=8, help="micro-batches a step (default 8)")
    parser.add_argument("--vpp", type=int, help="chunks a rank of the interleaved schedule (default 2)")
    parser.add_argument("--forward", type=float, default=1.0, help="time of a rank's forward (default 1)")
    parser.add_argument("--backward", type=float, default=2.0, help="time of its whole backward (default 2)")
    parser.add_argument("--weight", type=float, help="weight gradients' part of the backward (default half of it)")
    parser.add_argument("--hop", type=float, default=0.0, help="time of a transfer between ranks (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="picture to write; the suffix chooses the format")
    options = parser.parse_args()
    if options.weight is None:
        options.weight = options.backward / 2
    if not (options.forward > 0 and 0 < options.weight < options.backward and options.hop >= 0):
        parser.error("times must be positive, and --weight less than --backward")
    schedules = {name: 2 if name == "interleaved" else 1 for name in SCHEDULES}
    if options.vpp is not None:
        schedules["interleaved" if options.schedule == "all" else options.schedule] = options.vpp
    if options.schedule != "all":
        schedules = {options.schedule: schedules[options.schedule]}
    matplotlib.use("Agg")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        plot(schedules, options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
