"""Fit the planner's constants to published measurements, and show how far it is off.

python tools/fit_planner.py                 errors of the package's constants by group, and the regret of its choices
python tools/fit_planner.py --leave-out     … and of constants fitted without each group, on that group
python tools/fit_planner.py --fit           fit anew and write them into megallama/plan/constants.yaml

One model of kernels, collectives and schedules with eight constants for all rows; none is fitted to a row, a model or a
cluster. A group's error is the mean of |predicted / measured - 1| over its rows. The regret is what one loses by
running the layout that is predicted to be best of those measured for a model, a batch and a number of GPUs. --leave-out
and --fit take minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from megallama.files import write_whole
from megallama.plan.machine import FITTED, Constants, Machine, fitted
from megallama.plan.step import predict
from megallama.plan.table import Asked, read_table
from megallama.runtime.progress import items_progress

MEASURED = Path(__file__).parent / "planner" / "measured_a100.csv"
UNSEEN = Path(__file__).parent / "planner" / "larger_a100.csv"
START = Constants(matmul=0.8, memory=0.85, link=0.78, fabric=0.93, latency=5e-6, launch=1e-3, kernel=2e-4, step=0.02)
"""What one expects before the fit: large products, streams and NCCL's own tests on A100 reach about these shares (link:
235 of 300 GB/s, fabric: 23 of 25)."""
DOUBT = Constants(matmul=0.1, memory=0.1, link=0.1, fabric=0.1, latency=0.7, launch=0.7, kernel=0.7, step=0.7)
"""Standard deviations of the logarithms around START's: shares are known to a tenth, times to a factor of two."""
TRUST = 40 / 0.06
"""How much the mean error of the rows counts against half the squared deviations from START: rows that are 6 % off and
tell as much as 40 independent ones would."""
THIN = 4
"""Every so many-th row of the single-node group is fitted to; errors are of all rows."""
EVALUATIONS = 600
SINGLE, PUBLISHED = "single node", "Selene"


@dataclass(frozen=True)
class Measured:
    """A row with its group and the seconds that were measured."""

    asked: Asked
    group: str
    seconds: float

    @property
    def question(self) -> tuple[object, ...]:
        """Rows of one question differ in their layout alone."""
        job = self.asked.job
        return job.shape, job.seq_length, job.global_batch, job.layout.ranks, self.asked.cluster.name

    def predicted(self, constants: Constants) -> float:
        return predict(self.asked.job, Machine(self.asked.cluster, constants)).seconds


def read(path: Path) -> list[Measured]:
    """The measured rows."""
    found = []
    for asked in read_table(path):
        several = asked.job.layout.ranks > asked.cluster.gpus_per_node
        group = PUBLISHED if asked.cluster.name == "selene" else asked.record["model"] if several else SINGLE
        found.append(Measured(asked, group, float(asked.record["step_seconds"])))
    return found


def groups_of(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return dict(found)


def fit(rows: Sequence[Measured], tell: Callable[[int], None] = lambda more: None) -> Constants:
    """The constants with the least mean absolute logarithmic error, groups counting the same, not far from START."""
    groups = groups_of(rows)
    used = {name: found[::THIN] if name == SINGLE else found for name, found in groups.items()}

    def constants(x: np.ndarray) -> Constants:
        return Constants(*(start * math.exp(shift) for start, shift in zip(START, x, strict=True)))

    def loss(x: np.ndarray) -> float:
        tell(1)
        errors = [
            np.mean([abs(math.log(row.predicted(constants(x)) / row.seconds)) for row in found])
            for found in used.values()
        ]
        return float(np.mean(errors) + np.sum((x / DOUBT) ** 2) / 2 / TRUST)

    simplex = np.vstack([np.zeros(len(START)), 0.25 * np.eye(len(START))])
    options = {"maxfev": EVALUATIONS, "initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-5}
    return constants(minimize(loss, np.zeros(len(START)), method="Nelder-Mead", options=options).x)


def errors(rows: Sequence[Measured], constants: Constants) -> dict[str, float]:
    """Mean absolute relative error of each group."""
    return {
        name: float(np.mean([abs(row.predicted(constants) / row.seconds - 1) for row in found]))
        for name, found in groups_of(rows).items()
    }


def regrets(rows: Sequence[Measured], constants: Constants) -> dict[str, list[float]]:
    """For each group, of each question with several layouts: measured seconds of the predicted best over the best."""
    questions: dict[tuple[object, ...], list[Measured]] = defaultdict(list)
    for row in rows:
        questions[row.question].append(row)
    found: dict[str, list[float]] = defaultdict(list)
    for asked in questions.values():
        if len(asked) > 1:
            chosen = min(asked, key=lambda row: row.predicted(constants))
            found[asked[0].group].append(chosen.seconds / min(row.seconds for row in asked) - 1)
    return dict(found)


def left_out(rows: Sequence[Measured]) -> dict[str, float]:
    """Error on each group of constants fitted to the others."""
    names = list(groups_of(rows))
    found = {}
    with items_progress("fitting", EVALUATIONS * len(names)) as tell:
        for name in names:
            others = fit([row for row in rows if row.group != name], tell)
            found[name] = errors([row for row in rows if row.group == name], others)[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED, metavar="CSV", help="measured steps")
    parser.add_argument("--leave-out", action="store_true", help="also fit without each group, and predict it")
    parser.add_argument("--fit", action="store_true", help="fit, and write the constants into the package")
    arguments = parser.parse_args()
    try:
        rows = read(arguments.measured)
        constants = fitted()
        if arguments.fit:
            with items_progress("fitting", EVALUATIONS) as tell:
                constants = fit(rows, tell)
        show(rows, constants, left_out(rows) if arguments.leave_out else {})
        if arguments.fit:
            write_whole(FITTED, as_yaml(constants, errors(rows, constants)))
    except (ValueError, OSError) as error:
        sys.exit(f"fit_planner: error: {error}")


def show(rows: Sequence[Measured], constants: Constants, others: dict[str, float]) -> None:
    """Print the table of errors; `others` are those of left_out."""
    by_group, regret, larger = errors(rows, constants), regrets(rows, constants), read(UNSEEN)
    table = Table("group", "rows", "error", "left out", "questions", "regret", title="predicted against measured")
    for name, found in groups_of(rows).items():
        lost = regret.get(name, [])
        table.add_row(
            name,
            str(len(found)),
            f"{by_group[name]:.1%}",
            f"{others[name]:.1%}" if name in others else "",
            str(len(lost)) if lost else "",
            f"{np.mean(lost):.2%}" if lost else "",
        )
    everything = [x for found in regret.values() for x in found]
    table.add_row(
        "all", str(len(rows)), "", "", str(len(everything)), f"{np.mean(everything):.2%}" if everything else ""
    )
    unseen = np.mean([*errors(larger, constants).values()])
    table.add_row("175B to 1T, never fitted to", str(len(larger)), f"{unseen:.1%}")
    Console().print(table)


def as_yaml(constants: Constants, by_group: dict[str, float]) -> str:
    """What plan/constants.yaml holds."""
    told = {
        "constants": {name: float(f"{value:.4g}") for name, value in constants._asdict().items()},
        "residuals": {name: round(value, 4) for name, value in by_group.items()},
    }
    head = "# Fitted by tools/fit_planner.py to tools/planner/measured_a100.csv; residuals: mean relative errors.\n"
    return head + yaml.safe_dump(told, sort_keys=False)


if __name__ == "__main__":
    main()
