"""`megallama plan`: the best layouts of a model on a cluster, what a run takes, and the files to start it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megallama import options, presets
from megallama.config import Config, load
from megallama.files import make_folder
from megallama.pipeline import Event
from megallama.plan import pictures
from megallama.plan.advice import as_record, as_table, explain, layout_text, wide_console
from megallama.plan.cluster import CLUSTERS, Cluster, load_cluster
from megallama.plan.emit import emit
from megallama.plan.job import Job
from megallama.plan.machine import Machine, fitted
from megallama.plan.memory import memory_over_time
from megallama.plan.outlook import Outlook, Reliability, outlook_of, record_of, sentences, with_rates
from megallama.plan.search import RESERVE, Choice, search
from megallama.plan.step import Actions, actions_of, events_of, program_of, tail
from megallama.plan.table import estimate
from megallama.plan.timeline import Bar, Timeline

EXAMPLES = """examples:
  megallama plan --model.preset llama2-70b --cluster rsc --gpus 2048 --train.global_batch_size 1024 --explain
  megallama plan --config train.yaml --cluster my_cluster.yaml --gpus 64 --emit plans/64 --pictures plans/64
  megallama plan --estimate rows.csv --out predicted.csv

Every key of a run's configuration may be given as --section.key value or --config FILE: the model, data.seq_length and
train.global_batch_size decide; layout, micro-batch, schedule and recomputation are searched."""


def parser() -> argparse.ArgumentParser:
    """The command's own options; all others are a configuration's."""
    p = argparse.ArgumentParser(
        prog="megallama plan",
        description="Layouts of a model on a cluster, ranked by the time of a step; and what the run takes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
    p.add_argument("--cluster", default="rsc", metavar="NAME", help=f"{known}, or a YAML file [%(default)s]")
    p.add_argument("--gpus", type=int, metavar="N", help="of the whole job [one node]")
    p.add_argument("--top", type=int, default=10, metavar="N", help="layouts to show [%(default)s]")
    p.add_argument("--explain", action="store_true", help="say why the best wins and what binds")
    p.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    p.add_argument("--tokens", type=float, metavar="N", help="of the run, such as 2e12 [train.steps global batches]")
    p.add_argument("--emit", type=Path, metavar="DIR", help="write the best layout's train.yaml and train.sbatch")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="draw the step's timeline, memory and scaling")
    p.add_argument(
        "--estimate", type=Path, metavar="CSV", help="predict every row of a table instead (docs/planner.md)"
    )
    p.add_argument("--out", type=Path, metavar="CSV", help="where --estimate writes")
    rates = p.add_argument_group("rates, in place of the cluster's")
    rates.add_argument("--pue", type=float, help="power usage effectiveness of the building")
    rates.add_argument("--carbon", type=float, help="kilograms of CO2 equivalent a kWh")
    rates.add_argument("--price", type=float, help="of a GPU-hour")
    usual = Reliability()
    failures = p.add_argument_group("failures")
    for name, default, text in (
        ("--mtbf", usual.gpu_mtbf_hours, "GPU-hours between two"),
        ("--save", usual.save_seconds, "seconds that a save holds training up"),
        ("--restart", usual.restart_seconds, "seconds from a failure to the next step"),
    ):
        failures.add_argument(name, type=float, default=default, metavar="N", help=f"{text} [{default:.0f}]")
    failures.add_argument(
        "--commit", type=float, metavar="N", help="seconds until a save in the background is durable [as --save]"
    )
    return p


def run(argv: Sequence[str]) -> int:
    """One command line of `megallama plan`; returns the exit code.

    Raises:
        ValueError: a bad option, a model or a cluster that is not known, or nothing that fits.
    """
    try:
        asked, rest = parser().parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if asked.estimate is not None or asked.out is not None:
        return _estimate(asked, rest)
    cluster = with_rates(load_cluster(asked.cluster), asked.pue, asked.carbon, asked.price)
    gpus = cluster.gpus_per_node if asked.gpus is None else asked.gpus
    if gpus < 1 or asked.top < 1:
        raise ValueError(f"--gpus {gpus} and --top {asked.top} must be at least 1")
    config, machine = load(rest), Machine(cluster, fitted())
    found = search(config, gpus, machine, max(2, asked.top))  # the best one is compared with the next
    best, console = found.ranked[0], wide_console()
    outlook = _outlook(best, cluster, asked.tokens)
    reliability = Reliability(asked.mtbf, asked.save, asked.restart, asked.commit)
    told = sentences(outlook, reliability) if outlook else []
    if asked.json:
        layouts = [as_record(choice, machine) for choice in found.ranked[: asked.top]]
        head = {"cluster": cluster.name, "gpus": gpus, "valid": found.valid}
        run = record_of(outlook, reliability) if outlook else None
        print(json.dumps({**head, "layouts": layouts, "explanation": explain(found, machine), "run": run}, indent=1))
    else:
        console.print(as_table(found, machine, asked.top))
        for line in (*(explain(found, machine) if asked.explain else ()), *told):
            console.print(line)
    files: list[Path] = []
    if asked.pictures:
        files += draw(best, machine, asked.pictures)
    if asked.emit:
        title = f"{layout_text(best.job)}: {best.prediction.seconds:.3f} s a step on {gpus} GPUs of {cluster.name}"
        steps = outlook.steps if outlook else best.config.train.steps
        files += emit(
            replace(best.config, train=replace(best.config.train, steps=steps)), gpus, cluster, asked.emit, title
        )
    for file in files if not asked.json else ():
        console.print(str(file))
    return 0


def help_text() -> str:
    """Of `megallama plan --help`."""
    return parser().format_help() + options.describe(Config, presets.RECIPES.get("pretrain"))


def _estimate(asked: argparse.Namespace, rest: Sequence[str]) -> int:
    if asked.estimate is None or asked.out is None:
        raise ValueError("--estimate CSV and --out CSV go together: the table, and where to write it with predictions")
    usual = parser().parse_args([])
    rest = [*rest, *(f"--{name}" for name, value in vars(asked).items() if value != getattr(usual, name))]
    if rest := [name for name in rest if name not in ("--estimate", "--out")]:
        raise ValueError(f"--estimate takes everything from its table; {rest[0]} has no place beside it")
    print(f"{estimate(asked.estimate, asked.out)} rows in {asked.out}")
    return 0


def _outlook(best: Choice, cluster: Cluster, tokens: float | None) -> Outlook | None:
    """Of the whole run, where its length is known."""
    step_tokens = best.job.global_batch * best.job.seq_length
    if tokens is None:
        tokens = best.config.train.steps * step_tokens
        if not tokens:
            return None
    if not 1 <= tokens < math.inf:
        raise ValueError(f"--tokens {tokens:g} must be a number of at least 1, such as 2e12")
    return outlook_of(round(tokens), best.prediction.seconds, step_tokens, best.job.layout.ranks, cluster)


def draw(best: Choice, machine: Machine, folder: Path) -> list[Path]:
    """The pictures of a layout: its timeline, its memory over time, and how the model scales from there."""
    make_folder(folder)
    job = best.job
    timeline, memory, scaling = (folder / f"{name}.png" for name in ("timeline", "memory", "scaling"))
    step = timeline_of(job, machine)
    pictures.timeline(step, timeline)
    pictures.memory(memory_over_time(job, step.events), machine.cluster.memory_gib * (1 - RESERVE), memory)
    pictures.scaling(_scaling(best.config, job.layout.ranks, machine), scaling)
    return [timeline, memory, scaling]


def timeline_of(job: Job, machine: Machine) -> Timeline:
    """The whole step of a job, as its picture shows it."""
    actions, layout = actions_of(job, machine), job.layout
    events = events_of(job, actions)
    program = program_of(layout.schedule, layout.pp, job.micros, layout.vpp)
    after = _bars(job, machine, actions, events)
    return Timeline(layout.schedule, program, events, actions.hop, after, actions.recomputed)


def _bars(job: Job, machine: Machine, actions: Actions, events: Sequence[Event]) -> list[Bar]:
    """What follows the pipeline on each rank."""
    bars = []
    for rank in range(job.layout.pp):
        end = max(event.end for event in events if event.rank == rank)
        for label, seconds in zip(("replicas", "optimizer"), tail(job, machine, rank, actions), strict=True):
            if seconds:
                bars.append(Bar(rank, label, end, end + seconds))
                end += seconds
    return bars


def _scaling(config: Config, gpus: int, machine: Machine) -> list[pictures.ScalingPoint]:
    """The best layout on ever more GPUs, with the same global batch, from an eighth of these to four times as many."""
    points = []
    for count in (gpus // 8, gpus // 4, gpus // 2, gpus, 2 * gpus, 4 * gpus):
        if count < 1:
            continue
        try:
            best = search(config, count, machine, 1).ranked[0]
        except ValueError:  # does not fit, or the batch cannot be shared out
            continue
        rate = best.job.global_batch * best.job.seq_length / best.prediction.seconds
        points.append(pictures.ScalingPoint(count, rate, layout_text(best.job)))
    return points
