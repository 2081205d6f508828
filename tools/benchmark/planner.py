"""The planner against this engine on two CPU processes: relative step times of schedules, recomputation and layouts.

    python tools/benchmark/planner.py

All cases train the bench model and take turns, step by step, and so do the probes of the planner's machine: the speed
of a large matrix product, of memory, and of a collective between the two processes (about 12 GiB of memory). A case's
time is compared with the mean of all cases in the same turn, so that a machine that slows down from turn to turn does
not matter: what counts is whether the planner would have chosen right.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from train_step import BENCH, SEQUENCE, Step, rows

from megallama.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import Batch
from megallama.parallel.collectives import all_gather
from megallama.plan.cluster import Cluster
from megallama.plan.job import job_of
from megallama.plan.machine import Constants, Machine
from megallama.plan.step import predict
from megallama.runtime.launch import connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import NextToken, build_trainer

SAMPLES = 8
PROBES = ("product", "addition", "gather", "tiny gather")
REPEATS = 5
MOVED, GATHERED = 12 << 24, 8 << 20
"""Bytes that an addition reads and writes, and that each rank has after a gather."""
CASES = {
    "1f1b": ParallelConfig(pp=2),
    "1f1b, selective": ParallelConfig(pp=2, recompute="selective"),
    "1f1b, full": ParallelConfig(pp=2, recompute="full"),
    "gpipe": ParallelConfig(pp=2, schedule="gpipe"),
    "interleaved, 2 chunks": ParallelConfig(pp=2, vpp=2, schedule="interleaved"),
    "interleaved, 4 chunks": ParallelConfig(pp=2, vpp=4, schedule="interleaved"),
    "zero-bubble": ParallelConfig(pp=2, schedule="zero-bubble"),
    "1f1b, 5 + 3 layers": ParallelConfig(pp=2, layers_per_stage=(5, 3)),
    "tp 2": ParallelConfig(tp=2),
    "dp 2": ParallelConfig(),
    "dp 2, full": ParallelConfig(recompute="full"),
}


class Speeds(NamedTuple):
    """Of one process with one thread while the other works too.

    Attributes:
        flops: of a large product, a second.
        memory: bytes read and written by an addition, a second.
        link: bytes a second of an all-gather.
        latency: seconds of a tiny one.
    """

    flops: float
    memory: float
    link: float
    latency: float


def config_of(parallel: ParallelConfig) -> Config:
    return Config(
        model=BENCH,
        parallel=parallel,
        data=DataConfig(seq_length=SEQUENCE),
        train=TrainConfig(steps=10_000, micro_batch_size=1, global_batch_size=SAMPLES, dtype="float32", compile=False),
        optim=OptimConfig(warmup_steps=10),
    )


def trained(parallel: ParallelConfig) -> Step:
    """A step on the two ranks."""
    config = config_of(parallel)
    config.validate(2)
    mesh = build_mesh(parallel.tp, parallel.pp, BENCH.num_key_value_heads, False, torch.device("cpu"))
    trainer, loss = build_trainer(config, mesh), NextToken(BENCH.vocab_size, mesh.tp)
    own = rows(SAMPLES)[mesh.dp.rank :: mesh.dp.size]
    micros = [Batch.pack([row], parallel.tp) for row in own]
    return lambda: trainer.step(micros, loss)


def probes() -> dict[str, Step]:
    """What the planner must know of this machine, each REPEATS times."""
    both = build_mesh(2, 1, BENCH.num_key_value_heads, False, torch.device("cpu")).tp
    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    big, out = torch.randn(MOVED // 12), torch.empty(MOVED // 12)
    half, tiny = torch.randn(GATHERED // 8), torch.randn(2)

    def repeated(once: Step) -> Step:
        return lambda: [once() for _ in range(REPEATS)]

    return {
        "product": repeated(lambda: a @ b),
        "addition": repeated(lambda: torch.add(big, big, out=out)),
        "gather": repeated(lambda: all_gather(half, both)),
        "tiny gather": repeated(lambda: all_gather(tiny, both)),
    }


def speeds(turns: list[dict[str, float]]) -> Speeds:
    """From the seconds of the probes."""
    product, addition, gather, latency = (statistics.median(t[name] for t in turns) / REPEATS for name in PROBES)
    return Speeds(2 * 512 * 2048 * 2048 / product, MOVED / addition, GATHERED / max(1e-9, gather - latency), latency)


def machine_of(found: Speeds) -> Machine:
    """The planner's picture of two such processes."""
    gb = 1e9
    cluster = Cluster(
        "two CPU processes", "one thread", found.flops / 1e12, 1e3, found.memory / gb, 1, 2, found.link / gb,
        found.link / gb, 1, 1,
    )  # fmt: skip
    return Machine(cluster, Constants(1, 1, 1, 1, 2 * found.latency, 0, 0, 0))


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def worker(result: str, steps: int) -> None:
    """One of the two ranks."""
    world = resolve(os.environ)
    connect(world, rendezvous(world))
    torch.set_num_threads(1)
    cases = {name: trained(parallel) for name, parallel in CASES.items()}
    contestants = {**probes(), **cases}
    turns = [{name: timed(step) for name, step in contestants.items()} for _ in range(1 + steps)]
    if world.rank == 0:
        Path(result).write_text(json.dumps(turns[1:]))  # the first one warms up
    disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each case [%(default)s]")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        command += ["--worker", str(result), "--steps", str(arguments.steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        show(json.loads(result.read_text()))


def show(turns: list[dict[str, float]]) -> None:
    """Print measured and predicted times relative to the mean of the cases.

    Args:
        turns: seconds of each probe and case in every turn.
    """
    found = speeds(turns)
    machine = machine_of(found)
    predicted = {name: predict(job_of(config_of(parallel), 2), machine).seconds for name, parallel in CASES.items()}
    means = [statistics.mean(turn[name] for name in CASES) for turn in turns]
    table = Table("case", "seconds", "relative", "predicted", "error")
    errors = []
    for name in CASES:
        seconds = statistics.median(turn[name] for turn in turns)
        real = statistics.median(turn[name] / mean for turn, mean in zip(turns, means, strict=True))
        told = predicted[name] / statistics.mean(predicted.values())
        errors.append(abs(told / real - 1))
        table.add_row(name, f"{seconds:.2f}", f"{real:.3f}", f"{told:.3f}", f"{told / real - 1:+.1%}")
    Console().print(
        f"{found.flops / 1e9:.0f} GFLOP/s, {found.memory / 1e9:.1f} GB/s of memory and {found.link / 1e9:.2f} GB/s "
        f"between the processes, {found.latency * 1e3:.2f} ms of latency; predicted 1f1b: {predicted['1f1b']:.2f} s"
    )
    Console().print(table, f"mean error of the relative times: {statistics.mean(errors):.1%}")


if __name__ == "__main__":
    main()
