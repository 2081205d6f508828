"""Plot the loss of one or more runs, with gradient norm and learning rate below, from their metrics.jsonl.

python tools/plot_loss.py runs/a runs/b --output loss.png --reference "unigram entropy=6.42"
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tool runs from a checkout, installed or not
from megallama.runtime.metrics import read_metrics  # noqa: E402

SMALL = {"grad_norm": "gradient norm", "lr": "learning rate"}
"""Keys that get a small panel of their own, and its title."""


def series(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, without the steps that lack it or measured no finite number."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: list[float], window: int) -> list[float]:
    """Centred moving average: over `window` values, fewer at both ends, so that it does not lag behind a fall."""
    sums, last = [0.0, *accumulate(values)], len(values) - 1
    reach = [min(window // 2, n, last - n) for n in range(len(values))]
    return [(sums[n + r + 1] - sums[n - r]) / (2 * r + 1) for n, r in enumerate(reach)]


def plot(runs: dict[str, list[dict]], references: dict[str, float], output: Path) -> None:
    """Write the picture; its format is that of the file name's ending."""
    figure, axes = plt.subplot_mosaic(
        [["loss", "loss"], list(SMALL)], figsize=(9, 6.5), height_ratios=[3, 1], layout="constrained"
    )
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number}"
        steps, losses = series(records, "loss")
        axes["loss"].plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes["loss"].plot(steps, smoothed(losses, len(losses) // 20), color=color, linewidth=1.8, label=name)
        steps, losses = series(records, "valid_loss")
        if steps:
            axes["loss"].plot(steps, losses, "o--", color=color, linewidth=1, markersize=4, label=f"{name}, validation")
        for key in SMALL:
            axes[key].plot(*series(records, key), color=color, linewidth=1)
    for number, (name, value) in enumerate(references.items()):
        axes["loss"].axhline(value, color="0.35", linestyle=("--", ":", "-.")[number % 3], linewidth=1)
        axes["loss"].annotate(
            f"{name} {value:.3g}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=9, color="0.35",
        )  # fmt: skip
    decorate(axes["loss"], "loss")
    axes["loss"].legend(frameon=False)
    for key, title in SMALL.items():
        decorate(axes[key], title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def verdict(name: str, records: list[dict], references: dict[str, float]) -> str:
    """Where a run has ended: its last validation loss (else its last loss), and how far that is from each reference."""
    kind = "valid_loss" if series(records, "valid_loss")[0] else "loss"
    steps, losses = series(records, kind)
    places = [
        f"{abs(losses[-1] - value):.3f} {'below' if losses[-1] < value else 'above'} {other} ({value:.3f})"
        for other, value in references.items()
    ]
    title = "validation loss" if kind == "valid_loss" else "loss"
    return ", ".join([f"{name}: {title} {losses[-1]:.3f} at step {steps[-1]}", *places])


def reference(text: str) -> tuple[str, float]:
    """("entropy", 6.4) from "entropy=6.4"."""
    name, _, value = text.rpartition("=")
    number = float(value)
    if not name or not math.isfinite(number):
        raise ValueError(text)
    return name, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    parser.add_argument(
        "--reference", type=reference, nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="horizontal line at a known loss",
    )  # fmt: skip
    options = parser.parse_args()
    try:
        runs = {str(run): read_metrics(run) for run in options.runs}
        empty = [name for name, records in runs.items() if not series(records, "loss")[0]]
        if empty:
            raise ValueError(f"no step with a loss in {', '.join(empty)}")
        plot(runs, dict(options.reference), options.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"plot_loss: error: {error}\n")
    for name, records in runs.items():
        print(verdict(name, records, dict(options.reference)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
