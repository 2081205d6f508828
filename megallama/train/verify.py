"""`megallama verify`: prove a layout. The user's own configuration, shrunk, on its ranks against one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from multiprocessing import get_context

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megallama.config import Config
from megallama.runtime.faults import INTERRUPTED, guard
from megallama.runtime.launch import World, connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.shrink import one_process, replica_batches, shrink
from megallama.train.trajectory import TOLERANCES, Comparison, Trajectory, compare, record

STEPS = {"float64": 3, "float32": 20}
"""Exact arithmetic finds what is wrong at once; fp32 shows that the layout stays close as errors add up."""

MAX_RANKS = 64
"""Ranks that a bare command starts on its machine."""

SHOWN = 5
"""Worst gradients, and faults, that are listed."""


def run(config: Config) -> int:
    """Compare, print a table, and return 0 where all agrees, else 1.

    Under a launcher its ranks are used, and what tp and pp leave of them is dp. A bare command starts ranks itself.

    Raises:
        ValueError: the configuration cannot run on these ranks.
    """
    world = resolve(os.environ)
    if world.launcher == "bare":
        return _run_on_this_machine(config)
    config.validate(world.size)
    return _run_rank(config, world)


def bare_ranks(config: Config) -> int:
    """The ranks that a bare command starts: two data-parallel replicas if they are 8 ranks at most, else one.

    Raises:
        ValueError: the configuration is not valid, or needs more ranks than one machine should run.
    """
    replica = config.parallel.tp * config.parallel.pp
    config.validate(replica)
    if replica > MAX_RANKS:
        raise ValueError(
            f"parallel.tp={config.parallel.tp} x parallel.pp={config.parallel.pp} = {replica} ranks are too many to "
            f"start on this machine (at most {MAX_RANKS}); run `megallama verify` under torchrun, srun or mpirun"
        )
    if 2 * replica <= 8:
        try:
            config.validate(2 * replica)
        except ValueError:  # a global batch that cannot be halved
            return replica
        return 2 * replica
    return replica


def _run_on_this_machine(config: Config) -> int:
    """Start the ranks as torchrun would, on CPUs: this process keeps their store."""
    size = bare_ranks(config)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [
        context.Process(target=_bare_rank, args=(config, rank, size, store.port), daemon=True) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join()
    except KeyboardInterrupt:  # the ranks have it too, and speak
        for process in ranks:
            process.join(10)
        return INTERRUPTED
    return 0 if all(process.exitcode == 0 for process in ranks) else 1


def _bare_rank(config: Config, rank: int, size: int, port: int) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(value) for name, value in zip(names, (rank, size, rank, size), strict=True)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # the store is there already
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    raise SystemExit(_run_rank(config, resolve(os.environ)))


def _run_rank(config: Config, world: World) -> int:
    store = rendezvous(world)
    with guard(world, store, lambda: f"verify, {verification.dtype}"):
        device = connect(world, store)
        verification = Verification(config, device, Console(width=110, highlight=False))
        agrees = verification.run()
    disconnect()
    return 0 if agrees else 1


class Verification:
    """The comparison on the ranks of the default process group. Collective.

    Args:
        console: where rank 0 prints.

    Attributes:
        dtype: the precision that is being run.
    """

    def __init__(self, config: Config, device: torch.device, console: Console):
        self.config, self.console, self.dtype = config, console, ""
        parallel, model = config.parallel, config.model
        shape = shrink(config, dist.get_world_size() if dist.is_initialized() else 1, 1, "float64").model
        self.mesh = build_mesh(parallel.tp, parallel.pp, shape.num_key_value_heads, model.tied, device)

    def run(self) -> bool:
        """Whether every precision agrees; the same on all ranks."""
        verdicts: list[bool] = []
        for dtype, steps in STEPS.items():
            self.dtype = dtype
            small = shrink(self.config, self.mesh.world.size, steps, dtype)
            small.validate(self.mesh.world.size)
            ranks = self._gather(run_layout(small, self.mesh))
            failed = False
            if self.mesh.world.rank == 0:
                if not verdicts:
                    self.console.print(_describe(small, self.mesh))
                oracle = run_one_process(small, self.mesh)
                comparison = compare(ranks, oracle, small.model, TOLERANCES[dtype])
                for block in report(small, comparison):
                    self.console.print(block)
                failed = bool(comparison.failures())
            verdicts.append(not self._any(failed))
        if self.mesh.world.rank == 0:
            self.console.print(
                "PASS: this layout computes what one process does"
                if all(verdicts)
                else "FAIL: this layout does not compute what one process does"
            )
        return all(verdicts)

    def _gather(self, mine: Trajectory) -> list[Trajectory]:
        """Every rank's record, on rank 0."""
        world = self.mesh.world
        if world.size == 1:
            return [mine]
        found: list = [None] * world.size
        dist.gather_object(mine, found if world.rank == 0 else None, dst=0, group=world.group)
        return found

    def _any(self, failed: bool) -> bool:
        flag = torch.tensor(float(failed), device=self.mesh.device)
        if self.mesh.world.size > 1:
            dist.all_reduce(flag)
        return bool(flag)


def run_layout(config: Config, mesh: Mesh, probe: bool = True) -> Trajectory:
    """This rank's record of a small run. Collective over the mesh."""
    batches = [replica_batches(config, mesh.dp.size, step, mesh.tp.size) for step in range(config.train.steps)]
    return record(config, mesh, [replicas[mesh.dp.rank] for replicas in batches], probe)


def run_one_process(config: Config, mesh: Mesh, probe: bool = True) -> Trajectory:
    """The record of the same run on this rank alone: the replicas' micro-batches one after another."""
    batches = [replica_batches(config, mesh.dp.size, step, 1) for step in range(config.train.steps)]
    return record(
        one_process(config), Mesh(device=mesh.device), [list(chain(*replicas)) for replicas in batches], probe
    )


def _describe(config: Config, mesh: Mesh) -> str:
    model, parallel, train = config.model, config.parallel, config.train
    micros = config.micro_batches(mesh.world.size)
    return (
        f"verify: tp {mesh.tp.size} x pp {mesh.pp.size} x dp {mesh.dp.size} on {mesh.world.size} ranks "
        f"({mesh.device.type}) against one process\n"
        f"  schedule {parallel.schedule}, vpp {parallel.vpp}, recompute {parallel.recompute}, compile {train.compile}, "
        f"{micros} micro-batches of {train.micro_batch_size} a replica\n"
        f"  shrunk to hidden {model.hidden_size}, ffn {model.intermediate_size}, heads {model.num_attention_heads}, "
        f"K/V heads {model.num_key_value_heads}, vocabulary {model.vocab_size}, blocks of each stage "
        f"{list(parallel.layers_per_stage)}"
    )


def report(config: Config, comparison: Comparison) -> Iterator[Table | str]:
    """The result in one precision, for people."""
    limits, steps = comparison.tolerance, config.train.steps
    table = Table(title=f"{config.train.dtype}, {steps} steps", title_justify="left", box=None, pad_edge=False)
    table.add_column("", min_width=64)
    for column in ("error", "limit", ""):
        table.add_column(column, justify="right")

    def row(what: str, error: float, limit: float) -> None:
        table.add_row(what, f"{error:.1e}", f"{limit:.0e}", "ok" if error <= limit else "DIFFERS")

    row("loss, relative, every step", comparison.loss, limits.loss)
    row("gradient norm, relative, every step", comparison.norm, limits.norm)
    row(
        f"gradients of step 1, relative norm, worst of {len(comparison.gradients)}",
        comparison.gradient,
        limits.gradient,
    )
    worst = sorted(comparison.gradients.items(), key=lambda item: -_nan_last(item[1]))
    for name, error in worst[:SHOWN]:
        row(f"  {name}", error, limits.gradient)
    row(f"weights after step {steps}, absolute", comparison.weight, limits.weight)
    row("module outputs before step 1, relative norm", comparison.output, limits.gradient)
    table.add_row("replicas bitwise equal, every element owned once", "", "", "DIFFERS" if comparison.faults else "ok")
    yield table
    yield from (f"  {fault}" for fault in comparison.faults[:SHOWN])
    if len(comparison.faults) > SHOWN:
        yield f"  and {len(comparison.faults) - SHOWN} more"
    output, gradient = comparison.first_divergent_output(), comparison.first_divergent_gradient()
    if output:
        name, micro = output
        yield f"first divergent module, forward: {name} in micro-batch {micro}, error {comparison.outputs[output]:.1e}"
    elif gradient:
        error = comparison.gradients[gradient]
        yield f"forward agrees; first divergent gradient, backward: {gradient}, error {error:.1e}"
    yield ""


def _nan_last(error: float) -> float:
    return float("inf") if error != error else error
