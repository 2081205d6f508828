"""Clusters as data: what a GPU, a node and the network between nodes can do; plan/clusters/*.yaml, or a user's file.

Sources of the figures: the vendors' data sheets; for the two clusters of the Llama 2 paper, its section 2.2.1.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

CLUSTERS = Path(__file__).parent / "clusters"
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
}
"""Of a field's type: what YAML may give for it, and how one calls that."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Args:
        name: what it is called in reports.
        gpu: what `nvidia-smi` calls the GPU.
        peak_tflops: dense bfloat16 peak at the nominal power.
        memory_gib: of one GPU.
        memory_gbps: bandwidth of its memory, in GB/s.
        processors: streaming multiprocessors: what a matrix product's tiles are dealt to.
        gpus_per_node: GPUs that NVLink connects.
        link_gbps: NVLink of one GPU, each way, in GB/s.
        fabric_gbps: share of one GPU in its node's ports to the network, each way, in GB/s.
        fabric_efficiency: of a well-tuned collective on this network against InfiniBand's.
        watts: power limit of one GPU.
        nominal_watts: at which it reaches its peak.
        price: of one GPU-hour; 0 = not known.
        pue: power usage effectiveness of the building.
        carbon: kilograms of CO2 equivalent a kWh.
    """

    name: str
    gpu: str
    peak_tflops: float
    memory_gib: float
    memory_gbps: float
    processors: int
    gpus_per_node: int
    link_gbps: float
    fabric_gbps: float
    watts: float
    nominal_watts: float
    fabric_efficiency: float = 1.0
    price: float = 0.0
    pue: float = 1.1
    carbon: float = 0.385

    def __post_init__(self) -> None:
        for name, least in (("pue", 1), ("carbon", 0), ("price", 0)):  # a building draws what its GPUs draw, and more
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g} must be at least {least} and finite")


def load_cluster(name: str) -> Cluster:
    """The cluster of that name, or the one that a YAML file describes.

    Raises:
        ValueError: no such cluster or file, or a key that is missing, unknown or no positive number.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml")))
        raise ValueError(f"the cluster {name!r} is unknown; known are {known}, or give a YAML file (docs/planner.md)")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no cluster: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping of keys; see {CLUSTERS / 'rsc.yaml'}")
    return _cluster({"name": path.stem, **found}, path)


def _cluster(found: dict[str, Any], path: Path) -> Cluster:
    known = {field.name: field for field in fields(Cluster)}
    if unknown := sorted(set(found) - set(known), key=str):
        raise ValueError(f"{path}: unknown key {unknown[0]}; known are {', '.join(known)}")
    if missing := [name for name, field in known.items() if name not in found and field.default is MISSING]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    for name, value in found.items():
        wanted, kind = KINDS[str(known[name].type)]
        free = name in ("price", "carbon")
        if type(value) not in wanted:  # True is no number here
            raise ValueError(f"{path}: {name}={value!r} must be {kind}")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{path}: {name}={value!r} must be one line of letters that can be printed")
        if not isinstance(value, str) and not (0 < value < math.inf or (value == 0 and free)):
            raise ValueError(f"{path}: {name}={value} must be {'0 or more' if free else 'more than 0'}, and finite")
    try:
        return Cluster(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
