"""`megallama reward-eval`: reward models against test sets (Llama 2 paper, section 3.2.2, tables 7 and 8).

Accuracy of each model on each test set, as for helpfulness and safety models and test sets a grid of 2 x 2; accuracy by
rating; and calibration: how often people preferred what the model prefers with a certain probability.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megallama.config import SCALAR, Config
from megallama.data import read_pairs
from megallama.data.provenance import write_json
from megallama.files import whole
from megallama.runtime.launch import resolve
from megallama.runtime.mesh import Mesh
from megallama.train.models import adopt, frozen, mesh_for, open_weights, without_batches
from megallama.train.ranking import Bin, Judged, accuracy_by_rating, calibration, expected_calibration_error
from megallama.train.reward import Test, encode, judge
from megallama.train.run import on_mesh, run_folder
from megallama.train.sources import chat_format, tokenised

Verdicts = dict[str, dict[str, list[Judged]]]
"""Model -> test set -> verdict on each pair."""

REPORT, FIGURE = "reward_eval.json", "calibration.png"


def run(config: Config) -> int:
    """Judge, print the tables, write reward_eval.json and calibration.png; returns the exit code.

    Raises:
        ValueError: no models or test sets, or a folder holds no reward model.
    """
    reward = config.reward
    for key, given in (("models", reward.models), ("valid", reward.valid)):
        if not given:
            what = "reward models (output_dir of stage reward)" if key == "models" else "files of held-out pairs"
            raise ValueError(f"reward.{key} is empty: name {what}")
        if len(set(given)) < len(given):
            raise ValueError(f"reward.{key} names {max(given, key=given.count)} more than once")
    for path in reward.models:
        source = open_weights(path)
        if source.model.head != SCALAR:
            raise ValueError(f"{path} is a language model, not a reward model; name the output_dir of stage reward")
    source = open_weights(reward.models[0])
    config = adopt(without_batches(config, resolve(os.environ).size), source.model, source.folder)
    with on_mesh(config, lambda: "reward-eval") as mesh:
        verdicts = judge_all(config, mesh)
        with run_folder(config, mesh):
            if mesh.world.rank == 0:
                folder = Path(config.output_dir)
                show(verdicts)
                write_json(folder / REPORT, numbers(verdicts))
                plot(verdicts, folder / FIGURE)
                print(f"{folder / REPORT}, {folder / FIGURE}")
    return 0


def judge_all(config: Config, mesh: Mesh) -> Verdicts:
    """Every model on every test set, one model at a time; the same on every rank. Collective."""
    form, reward = chat_format(config), config.reward
    tests: dict[str, Test] = {}
    for path in reward.valid:
        records = read_pairs(path)
        encoded = tokenised(records, lambda part: encode(form, part, "none", config.data.seq_length), mesh)
        tests[path] = records, encoded
    verdicts: Verdicts = {}
    for path in reward.models:
        source = open_weights(path)
        plain = replace(config, model=source.model)
        trainer = frozen(plain, mesh_for(source.model, mesh), source)
        verdicts[path] = {name: judge(trainer, test) for name, test in tests.items()}
    return verdicts


def show(verdicts: Verdicts) -> None:
    """Print the grid, accuracy by rating, and calibration."""
    console = Console()
    tests = list(next(iter(verdicts.values())))
    grid = Table("accuracy", *tests, title="models x test sets")
    ratings = Table("model", "test set", "rating", "pairs", "accuracy", title="by rating")
    reliability = Table("model", "test set", "predicted", "pairs", "accuracy", title="calibration")
    for model, by_test in verdicts.items():
        tables = {name: accuracy_by_rating(judged) for name, judged in by_test.items()}
        grid.add_row(model, *(f"{table['all'][0]:.1%}" for table in tables.values()))
        for name, table in tables.items():
            for rating, (accuracy, count) in table.items():
                ratings.add_row(model, name, rating, str(count), f"{accuracy:.1%}")
            rows = calibration(by_test[name])
            for row in rows:
                reliability.add_row(model, name, f"{row.predicted:.1%}", str(row.n), f"{row.accuracy:.1%}")
            total = sum(row.n for row in rows)
            reliability.add_row(model, name, "mean error", str(total), f"{expected_calibration_error(rows):.1%}")
    console.print(grid, ratings, reliability)


def numbers(verdicts: Verdicts) -> dict[str, Any]:
    """All that the tables show: model -> test set -> accuracy by rating, calibration and its mean error."""

    def of_test(judged: list[Judged]) -> dict[str, Any]:
        rows: list[Bin] = calibration(judged)
        return {
            "accuracy": {name: {"accuracy": a, "pairs": n} for name, (a, n) in accuracy_by_rating(judged).items()},
            "calibration": [row._asdict() for row in rows],
            "expected_calibration_error": expected_calibration_error(rows),
        }

    return {model: {name: of_test(judged) for name, judged in tests.items()} for model, tests in verdicts.items()}


def plot(verdicts: Verdicts, path: Path) -> None:
    """Predicted probability against how often people agreed, a panel for each test set and a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tests = list(next(iter(verdicts.values())))
    figure, axes = plt.subplots(1, len(tests), figsize=(4.5 * len(tests), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], tests, strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
        for model, by_test in verdicts.items():
            rows = calibration(by_test[name])
            axis.plot([row.predicted for row in rows], [row.accuracy for row in rows], "o-", label=Path(model).name)
        axis.set(title=Path(name).name, xlabel="predicted probability", ylabel="share that people preferred")
        axis.legend()
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
