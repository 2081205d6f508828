"""The planner on the Llama 2 paper: GPU-hours of its four models, and its two clusters side by side.

python tools/plan_paper.py                          both tables, from 256 to 2048 GPUs
python tools/plan_paper.py --gpus 1024 --json out.json

The best layout of all for each model, cluster and number of GPUs: 2T tokens, 4M tokens a step, 4096 a sequence. The
paper says neither how many GPUs a model had nor its layout; it gives GPU-hours, and that RoCE at 350 W reached up
to 90 % of InfiniBand at 400 W. The columns between change one thing at a time: the power limit, the network.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from megallama.config import load
from megallama.files import write_whole
from megallama.plan.advice import layout_text, wide_console
from megallama.plan.cluster import Cluster, load_cluster
from megallama.plan.machine import Machine, fitted
from megallama.plan.outlook import PAPER
from megallama.plan.search import Choice, search
from megallama.plan.work import tflops
from megallama.runtime.progress import items_progress

TOKENS, BATCH = 2e12, 1024
MODELS = ("llama2-7b", "llama2-13b", "llama2-34b", "llama2-70b")


def clusters() -> dict[str, Cluster]:
    """The paper's two clusters, and what lies between them."""
    rsc, production = load_cluster("rsc"), load_cluster("production")
    return {
        "rsc": rsc,
        "350 W": replace(rsc, watts=production.watts),
        "RoCE": replace(rsc, fabric_efficiency=production.fabric_efficiency),
        "production": production,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[256, 512, 1024, 2048], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    arguments = parser.parse_args()
    try:
        found = plan(arguments.gpus)
        show(found)
        if arguments.json:
            rows = [{"model": m, "gpus": n, "cluster": c, **figures} for (m, n, c), (_, figures) in found.items()]
            write_whole(arguments.json, json.dumps(rows, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"plan_paper: error: {error}")


Found = dict[tuple[str, int, str], tuple[Choice, dict[str, float]]]


def plan(gpus: list[int]) -> Found:
    """(model, GPUs, cluster) -> the best layout and its figures; what does not fit is left out."""
    found: Found = {}
    with items_progress("planned", len(MODELS) * len(gpus) * len(clusters())) as tell:
        for model in MODELS:
            config = load(["--model.preset", model, "--train.global_batch_size", str(BATCH)])
            for count in gpus:
                for name, cluster in clusters().items():
                    machine = Machine(cluster, fitted())
                    try:
                        best = search(config, count, machine, 1).ranked[0]
                    except ValueError:
                        tell(1)
                        continue
                    seconds = best.prediction.seconds
                    steps = TOKENS / (BATCH * best.job.seq_length)
                    found[model, count, name] = (
                        best,
                        {
                            "step_seconds": seconds,
                            "tflops_per_gpu": tflops(best.job, seconds),
                            "gpu_hours": steps * seconds * count / 3600,
                        },
                    )
                    tell(1)
    return found


def show(found: Found) -> None:
    """Print both tables."""
    console = wide_console()
    hours = Table("model", "GPUs", "best layout on rsc", "TFLOP/s", "GPU-hours", "paper", "ratio", title="2T tokens")
    paper = dict(zip(MODELS, PAPER, strict=True))
    for (model, count, name), (best, figures) in found.items():
        if name == "rsc":
            printed = paper[model].gpu_hours
            hours.add_row(
                model, str(count), layout_text(best.job), f"{figures['tflops_per_gpu']:.0f}",
                f"{figures['gpu_hours']:,.0f}", f"{printed:,}", f"{figures['gpu_hours'] / printed:.2f}",
            )  # fmt: skip
    names = [name for name in clusters() if name != "rsc"]
    speeds = Table("model", "GPUs", *names, title="speed against InfiniBand at 400 W")
    for model, count in dict.fromkeys((model, count) for model, count, _ in found):
        whole = found[model, count, "rsc"][1]["step_seconds"]
        ratios = [f"{whole / found[model, count, name][1]['step_seconds']:.1%}" for name in names]
        speeds.add_row(model, str(count), *ratios)
    console.print(hours, speeds)


if __name__ == "__main__":
    main()
