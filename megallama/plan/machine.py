"""How long kernels, collectives and hops take on a cluster: its data sheet times the few constants that were fitted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from megallama.plan.cluster import Cluster

FITTED = Path(__file__).parent / "constants.yaml"

TILES = ((256, 128), (128, 256))
"""Tiles of a matrix product that libraries choose among. Smaller ones exist, but measured steps show whole waves of
these: to count with others makes the predictions worse."""
RAMP = 64
"""Multiply-adds along the inner dimension that a tile's start and end cost."""
STATIC_SHARE = 0.25
"""Of the nominal power: what a GPU draws whatever its clock is (leakage, memory, links)."""


class Constants(NamedTuple):
    """All that was fitted to measurements; `tools/fit_planner.py` makes them, plan/constants.yaml keeps them.

    Attributes:
        matmul: share of the peak that large matrix products reach.
        memory: share of the memory's bandwidth that other kernels reach.
        link: share of NVLink's bandwidth that collectives reach.
        fabric: share of the network's bandwidth that transfers reach.
        latency: seconds of a collective for each rank in it.
        launch: seconds in which the host launches the kernels of a block's forward.
        kernel: seconds of a block's forward in which the GPU starts and ends kernels.
        step: seconds of a step that belong to nothing else.
    """

    matmul: float
    memory: float
    link: float
    fabric: float
    latency: float
    launch: float
    kernel: float
    step: float


@cache
def fitted() -> Constants:
    """The constants that the package ships."""
    return Constants(**yaml.safe_load(FITTED.read_text(encoding="utf-8"))["constants"])


class Group(NamedTuple):
    """Ranks of a collective: how many, and how many of them in one node."""

    size: int
    in_node: int


@dataclass(frozen=True)
class Machine:
    """A cluster with its constants; all results are seconds."""

    cluster: Cluster
    constants: Constants

    @property
    def clock(self) -> float:
        """Of the GPU under its power limit, against its nominal one: dynamic power grows with the cube of the clock,
        since voltage follows it. Matrix products feel it; memory and links have clocks of their own."""
        nominal = self.cluster.nominal_watts
        dynamic = self.cluster.watts - STATIC_SHARE * nominal
        if dynamic <= 0:
            raise ValueError(
                f"cluster {self.cluster.name}: watts={self.cluster.watts:g} is less than what a GPU of "
                f"{nominal:g} W draws at rest; check watts and nominal_watts"
            )
        return min(1.0, (dynamic / (nominal * (1 - STATIC_SHARE))) ** (1 / 3))

    @property
    def flops(self) -> float:
        """Operations a second of large matrix products."""
        return self.cluster.peak_tflops * 1e12 * self.constants.matmul * self.clock

    @property
    def bandwidth(self) -> float:
        """Bytes a second of kernels that only move memory."""
        return self.cluster.memory_gbps * 1e9 * self.constants.memory

    def matmul(self, m: int, n: int, k: int) -> float:
        """An (m, k) times (k, n) product of bfloat16: whole waves of tiles, or its memory if that takes longer."""
        processors = self.cluster.processors

        def waves(rows: int, columns: int) -> int:
            return -(-(-(-m // rows) * -(-n // columns)) // processors)

        work = min(waves(r, c) * r * c for r, c in TILES) * processors * 2 * (k + RAMP)
        return max(work / self.flops, 2 * (m * k + k * n + m * n) / self.bandwidth)

    def launched(self, work: float, kernels: float = 1.0) -> float:
        """`work` seconds of the GPU in `kernels` times as many kernels as a block's forward has. The host launches them
        meanwhile, and may be the slower one."""
        return max(work + kernels * self.constants.kernel, kernels * self.constants.launch)

    def moved(self, size: float) -> float:
        """`size` bytes read or written by kernels that do nothing else."""
        return size / self.bandwidth

    def group(self, size: int, stride: int) -> Group:
        """`size` ranks that stand `stride` apart."""
        return Group(size, min(size, max(1, self.cluster.gpus_per_node // stride)))

    def gathered(self, size: float, group: Group, calls: int = 1) -> float:
        """An all-gather to, or a reduce-scatter of, `size` bytes on each rank, in so many calls."""
        if group.size == 1:
            return 0.0
        passed, speed = size, self.cluster.link_gbps * 1e9 * self.constants.link  # its own part is copied as slowly
        if group.size > group.in_node:  # all its GPUs in a node send; groups that stand side by side share the ports
            passed, speed = (group.size - 1) / group.size * size, min(speed, group.in_node * self.fabric)
        return passed / speed + calls * self.constants.latency * (group.size - 1) / 2

    @property
    def fabric(self) -> float:
        """Bytes a second that one GPU sends to another node."""
        return self.cluster.fabric_gbps * 1e9 * self.constants.fabric * self.cluster.fabric_efficiency

    def hop(self, size: float, within_node: bool) -> float:
        """`size` bytes from one GPU to another."""
        link = self.cluster.link_gbps * 1e9 * self.constants.link
        return size / (link if within_node else self.fabric) + self.constants.latency
