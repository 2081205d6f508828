"""How a chat model has changed over its versions: the distribution of the reward models' scores (as figure 20 of the
Llama 2 paper) and the score by rules, on the same held-out prompts.

python tools/plot_versions.py judged_sft judged_v1 … judged_v5 --control judged_control --output versions.png

Each folder is a run of `megallama rejection-sample` on the held-out prompts, with the rules.json that
`check_answers.py --json` has written into it. The verdict is about the rules: the last version must be better than the
first by two standard errors of the difference and the control must not; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megallama.files import whole

ERRORS = 2.0
"""Standard errors by which a rise must exceed nothing."""
WIDTH = 0.12
"""Of the smoothing of a distribution, in probabilities."""


class Version(NamedTuple):
    """One folder: probabilities by the reward models of its answers, and its mean score by rules of each prompt."""

    name: str
    helpfulness: np.ndarray
    safety: np.ndarray
    rules: dict[str, float]


def read(folder: Path) -> Version:
    """Raises ValueError where the folder is not complete."""
    try:
        rules = json.loads((folder / "rules.json").read_text(encoding="utf-8"))
        lines = [
            json.loads(line)
            for part in sorted((folder / "parts").glob("*.jsonl"))
            for line in part.read_text(encoding="utf-8").splitlines()
        ]
        scores = {name: probabilities([line[name] for line in lines]) for name in ("helpfulness", "safety")}
        by_prompt = rules["by_prompt"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no judged version with its rules.json ({error!r})") from None
    if not lines:
        raise ValueError(f"{folder}/parts has no answers")
    return Version(folder.name.removeprefix("judged_"), scores["helpfulness"], scores["safety"], by_prompt)


def probabilities(logits: list[float | None]) -> np.ndarray:
    """Scores behind a sigmoid; none where a judge was missing."""
    return 1 / (1 + np.exp(-np.array([x for x in logits if x is not None], np.float64)))


def density(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A Gaussian kernel's estimate, reflected at 0 and 1, where probabilities end."""
    mirrored = np.concatenate([values, -values, 2 - values])
    bumps = np.exp(-0.5 * ((places[:, None] - mirrored) / WIDTH) ** 2)
    return bumps.sum(1) / (len(values) * WIDTH * math.sqrt(2 * math.pi))


def rise(first: Version, last: Version) -> tuple[float, float]:
    """(mean difference of the rules' score over the prompts that both have, its standard error)."""
    keys = sorted(first.rules.keys() & last.rules.keys())
    if len(keys) < 2:
        raise ValueError(f"{first.name} and {last.name} have {len(keys)} prompts in common; two are needed")
    gaps = np.array([last.rules[key] - first.rules[key] for key in keys])
    return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))


def mean(version: Version) -> float:
    return sum(version.rules.values()) / len(version.rules)


def plot(versions: list[Version], control: Version | None, output: Path) -> None:
    """Three panels: helpfulness scores, safety scores, rules."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    places = np.linspace(0, 1, 201)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(versions)))

    def ridge(axis: Axes, title: str, values: dict[str, np.ndarray]) -> None:
        for (name, found), color in zip(values.items(), colors, strict=True):
            if len(found):
                axis.plot(places, density(found, places), color=color, label=f"{name} (mean {found.mean():.2f})")
        axis.set(title=title, xlabel="reward model's score", yticks=[])
        axis.legend(fontsize=8)

    ridge(axes[0], "helpfulness model", {v.name: v.helpfulness for v in versions})
    ridge(axes[1], "safety model", {v.name: v.safety for v in versions})
    axes[2].plot([v.name for v in versions], [mean(v) for v in versions], "o-", color="0.2", label="versions")
    if control is not None:
        axes[2].axhline(mean(control), color="C3", linestyle="--", label=f"{control.name} ({mean(control):.3f})")
    axes[2].set(title="score by rules, held-out prompts", ylim=(0, 1))
    axes[2].legend()
    with whole(output) as temporary:
        figure.savefig(temporary, format=output.suffix[1:] or "png", dpi=120)
    plt.close(figure)


def report(versions: list[Version], control: Version | None) -> tuple[str, bool]:
    """A table of means with standard errors of their difference to the first version, and whether all is as it must."""
    first, good = versions[0], True
    lines = [f"{'version':<12}{'helpfulness':>12}{'safety':>9}{'rules':>8}   rise of the rules' score"]
    for version in [*versions, *([control] if control else [])]:
        numbers: list[Any] = [np.mean(x) if len(x) else math.nan for x in (version.helpfulness, version.safety)]
        gap, error = rise(first, version)
        told = "" if version is first else f"{gap:+.3f} ± {error:.3f}"
        lines.append(f"{version.name:<12}{numbers[0]:>12.3f}{numbers[1]:>9.3f}{mean(version):>8.3f}   {told}")
    gap, error = rise(first, versions[-1])
    if gap <= ERRORS * error:
        good = False
        lines.append(f"{versions[-1].name} is not better than {first.name} by {ERRORS:g} standard errors")
    if control is not None:
        gap, error = rise(first, control)
        if gap > ERRORS * error:
            good = False
            lines.append(f"the control is better than {first.name} by more than {ERRORS:g} standard errors")
    if good:
        against = f", and {control.name} does not" if control else ""
        lines.append(f"by rules that no reward model has seen, {versions[-1].name} beats {first.name}{against}")
    return "\n".join(lines), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", type=Path, metavar="FOLDER", help="judged versions, the oldest first")
    parser.add_argument("--control", type=Path, metavar="FOLDER", help="a judged model that must not be better")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture, such as versions.png")
    arguments = parser.parse_args()
    try:
        versions = [read(folder) for folder in arguments.versions]
        if len(versions) < 2:
            raise ValueError("give at least two versions, the oldest first")
        control = read(arguments.control) if arguments.control else None
        text, good = report(versions, control)
        plot(versions, control, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_versions: error: {error}")
    print(text)
    print(arguments.output)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
