"""What a search has found, for people: a table, and in words why the best wins and what holds it back."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megallama.plan.job import Job
from megallama.plan.machine import Machine
from megallama.plan.search import GIB, Choice, Found
from megallama.plan.step import Prediction
from megallama.plan.work import tflops

PARTS = {
    "compute": "compute",
    "collectives": "tensor-parallel communication",
    "bubble": "the pipeline's bubble and hops",
    "replicas": "communication of the replicas",
    "optimizer": "the optimizer's update",
    "overhead": "fixed overhead",
}
"""Parts of a step -> how one says it."""


def wide_console() -> Console:
    """The terminal; elsewhere (a file, a pipe) wide enough for a table of layouts."""
    console = Console(highlight=False, markup=False)  # names and paths may hold brackets
    return console if console.is_terminal else Console(highlight=False, markup=False, width=150)


def layout_text(job: Job) -> str:
    """tp 8 x pp 4 x dp 64, 2 chunks, micro-batch 1, 1f1b, recompute none."""
    layout = job.layout
    chunks = f", {layout.vpp} chunks" if layout.vpp > 1 else ""
    ranks = f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}"
    return f"{ranks}{chunks}, micro-batch {layout.micro_batch}, {layout.schedule}, recompute {layout.recompute}"


def as_record(choice: Choice, machine: Machine) -> dict[str, Any]:
    """A choice as an object of --json."""
    job, layout, prediction = choice.job, choice.job.layout, choice.prediction
    speed = tflops(job, prediction.seconds)
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "dp": layout.dp,
        "micro_batch_size": layout.micro_batch,
        "schedule": layout.schedule,
        "recompute": layout.recompute,
        "layers_per_stage": list(layout.layers_per_stage),
        "step_seconds": prediction.seconds,
        "tokens_per_second": job.global_batch * job.seq_length / prediction.seconds,
        "tflops_per_gpu": speed,
        "mfu": speed / machine.cluster.peak_tflops,
        "memory_gib": choice.memory / GIB,
        "parts": {name: getattr(prediction, name) for name in PARTS},
    }


def as_table(found: Found, machine: Machine, top: int) -> Table:
    """The `top` fastest layouts."""
    ranked = found.ranked[:top]
    title = f"{machine.cluster.name} ({machine.cluster.gpu}): the {len(ranked)} fastest of {found.valid} layouts"
    columns = (
        "",
        "tp",
        "pp",
        "vpp",
        "dp",
        "micro",
        "schedule",
        "recompute",
        "s/step",
        "TFLOP/s",
        "MFU",
        "GiB",
        "bubble",
    )
    table = Table(*columns, title=title)
    for place, choice in enumerate(ranked, 1):
        record, layout = as_record(choice, machine), choice.job.layout
        table.add_row(
            str(place), str(layout.tp), str(layout.pp), str(layout.vpp), str(layout.dp), str(layout.micro_batch),
            layout.schedule, layout.recompute, f"{choice.prediction.seconds:.3f}", f"{record['tflops_per_gpu']:.1f}",
            f"{record['mfu']:.1%}", f"{record['memory_gib']:.1f}", f"{_share(choice.prediction, 'bubble'):.1%}",
        )  # fmt: skip
    return table


def explain(found: Found, machine: Machine) -> list[str]:
    """Why the best wins, and what binds."""
    best = found.ranked[0]
    prediction, record = best.prediction, as_record(best, machine)
    parts = sorted(PARTS, key=lambda name: -getattr(prediction, name))
    made_of = ", ".join(f"{_share(prediction, name):.1%} {PARTS[name]}" for name in parts)
    lines = [
        f"Fastest: {layout_text(best.job)}: {prediction.seconds:.3f} s a step, {record['tflops_per_gpu']:.1f} TFLOP/s "
        f"a GPU ({record['mfu']:.1%} of the peak), {record['memory_gib']:.1f} of {machine.cluster.memory_gib:g} GiB.",
        f"A step is {made_of}.",
        f"What binds: {_binding(found, parts)}",
    ]
    for tp, rival in found.by_tp.items():
        if tp != best.job.layout.tp:
            lines.append(f"With tp {tp} the best is {_against(rival, best)}")
    if len(found.ranked) > 1:
        lines.append(f"The next best is {_against(found.ranked[1], best)}")
    return lines


def _share(prediction: Prediction, name: str) -> float:
    return getattr(prediction, name) / prediction.seconds


def _binding(found: Found, parts: list[str]) -> str:
    best, roomy = found.ranked[0], found.roomy
    lost = best.prediction.seconds / roomy.prediction.seconds - 1
    worst = next(name for name in parts if name != "compute")
    share = _share(best.prediction, worst)
    if lost > share / 4 and lost > 0.005:
        return (
            f"memory. With {roomy.memory / GIB:.0f} GiB a GPU, {layout_text(roomy.job)} would be {lost:.1%} faster; "
            f"after that {PARTS[worst]}, {share:.1%} of the step."
        )
    return f"{PARTS[worst]}, {share:.1%} of the step; more memory would win {lost:.1%}."


def _against(rival: Choice, best: Choice) -> str:
    """How another layout compares, and by what it loses most."""
    gaps = {name: getattr(rival.prediction, name) - getattr(best.prediction, name) for name in PARTS}
    most = max(gaps, key=lambda name: gaps[name])
    slower = rival.prediction.seconds / best.prediction.seconds - 1
    return (
        f"{layout_text(rival.job)}: {rival.prediction.seconds:.3f} s (+{slower:.1%}); it loses most, "
        f"{gaps[most]:.3f} s, by {PARTS[most]}."
    )
