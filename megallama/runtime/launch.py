"""Who am I, and how do I reach the others: one rank resolver for torchrun, srun, mpirun and a bare process.

world = resolve(os.environ)
store = rendezvous(world)
with guard(world, store, where, logs):        # runtime.faults
    device = connect(world, store)
    ...
disconnect()
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import resource
import socket
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for its peers, at the start and in every collective, before it calls them lost."""

SLURM_RESERVED_STEPS = 0xFFFFFFF0
"""From here on, Slurm's step ids are its own: batch script, interactive shell, extern. Those are not srun's tasks."""


class World(NamedTuple):
    """One process among those that a launcher started.

    Attributes:
        rank, size: of the job.
        local_rank, local_size: of this host.
        host: this host's name.
        launcher: torchrun, srun, mpirun or bare.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"
    launcher: str = "bare"


class Names(NamedTuple):
    """The environment variables in which a launcher tells a process its place."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


TORCHRUN = Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = Names(
    "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)
HYDRA = Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH and Intel MPI
SRUN = Names("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


def resolve(env: Mapping[str, str]) -> World:
    """The place of this process, from the variables that its launcher set.

    The innermost launcher wins: torchrun and mpirun may themselves run inside an srun task, whose variables their
    processes inherit. Slurm's variables alone are not enough to be an srun task: batch scripts and interactive shells
    have them too.

    Raises:
        ValueError: a launcher's variables are incomplete or contradict each other.
    """
    host = socket.gethostname()
    if "RANK" in env and "WORLD_SIZE" in env:
        names = TORCHRUN
    elif OPEN_MPI.rank in env:
        names = OPEN_MPI
    elif HYDRA.local_rank in env and HYDRA.rank in env:  # srun with PMI2 sets PMI_RANK too, but not the local one
        names = HYDRA
    elif 0 <= int(env.get("SLURM_STEP_ID", -1)) < SLURM_RESERVED_STEPS and SRUN.rank in env:
        names = SRUN
    else:
        return World(host=host)
    missing = [name for name in names[1:] if name not in env]
    if missing:
        raise ValueError(f"{names.launcher} started this process but did not set {', '.join(missing)}: set it as well")
    local_size = tasks_on_node(env) if names is SRUN else int(env[names.local_size])
    rank, size, local_rank = (int(env[name]) for name in (names.rank, names.size, names.local_rank))
    world = World(rank, size, local_rank, local_size, host, names.launcher)
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        shown = ", ".join(f"{name}={env[name]}" for name in names[1:])
        raise ValueError(f"{names.launcher} set an impossible place: {shown}")
    return world


def tasks_on_node(env: Mapping[str, str]) -> int:
    """Tasks of this Slurm step on this node, from a list such as "4(x2),3" (three nodes: 4, 4 and 3 tasks)."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(count)] * int(times or 1)
    return counts[int(env.get("SLURM_NODEID", 0))]


def hosts(nodelist: str) -> list[str]:
    """The names in a Slurm node list: "n[001-003,007],login1" has five. Numbers keep their leading zeros."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):  # commas inside brackets do not separate
        head, bracket, rest = part.partition("[")
        if not bracket:
            names.append(part)
            continue
        inside, _, tail = rest.partition("]")
        ends = hosts(tail) if tail else [""]
        for item in inside.split(","):
            first, _, last = item.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{head}{n:0{len(first)}d}{end}" for n in numbers for end in ends]
    return names


def rendezvous(world: World, timeout: datetime.timedelta = TIMEOUT) -> dist.Store | None:
    """The key-value store that all ranks share; None for a world of one. Collective.

    MASTER_ADDR and MASTER_PORT are used where they are set. Else, under srun, they are the step's first node and a port
    made from the job's and the step's number; under mpirun, rank 0 opens a free port and MPI tells the others.

    Raises:
        ValueError: the first node's name does not resolve; or MPI sees another number of ranks than mpirun started
            (mpi4py belongs to another MPI).
    """
    if world.size == 1:
        return None
    alone = world.local_size == world.size  # one host: its name need not resolve
    if world.launcher == "mpirun" and "MASTER_PORT" not in os.environ:
        return _mpi_store(world, "127.0.0.1" if alone else world.host, timeout)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world.launcher == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        host = host or ("127.0.0.1" if alone else node_address(hosts(nodes)[0]))
        port = port or str(slurm_port(os.environ))
    if not host or not port:
        raise ValueError(f"{world.launcher} started {world.size} ranks: set MASTER_ADDR and MASTER_PORT to rank 0's")
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    return store


def node_address(node: str) -> str:
    """What a Slurm node is reached by: its name, or Slurm's own address of it where no resolver knows the name.

    Raises:
        ValueError: neither resolves. Said here, since the store would go on trying until its timeout.
    """
    if resolves(node):
        return node
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["scontrol", "--oneliner", "show", "node", node]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        known = re.search(r"\bNodeAddr=(\S+)", shown)
        if known and resolves(known[1]):
            return known[1]
    raise ValueError(
        f"the name of this step's first node, {node}, does not resolve on {socket.gethostname()}, and scontrol knows "
        f"no address of it: set MASTER_ADDR to one"
    )


def resolves(name: str) -> bool:
    """Whether the machine knows an address by this name."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def slurm_port(env: Mapping[str, str]) -> int:
    """A port below the ephemeral range that every task of a step computes alike and other steps hardly share."""
    return 15_000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 15_000


def _mpi_store(world: World, host: str, timeout: datetime.timedelta) -> dist.Store:
    from mpi4py import MPI  # initialises MPI: only where mpirun started us

    if world.size != MPI.COMM_WORLD.size:
        raise ValueError(
            f"mpirun started {world.size} ranks but mpi4py sees {MPI.COMM_WORLD.size}: it is built for another MPI; "
            f"reinstall mpi4py with this one, or set MASTER_ADDR and MASTER_PORT"
        )
    host = os.environ.get("MASTER_ADDR", host)
    if world.rank == 0:  # the server takes a free port first, so nobody else can take it in between
        store = dist.TCPStore(host, 0, world.size, is_master=True, timeout=timeout, wait_for_workers=False)
        MPI.COMM_WORLD.bcast((host, store.port))
        return store
    host, port = MPI.COMM_WORLD.bcast(None)
    return dist.TCPStore(host, port, world.size, is_master=False, timeout=timeout)


def choose_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    A launcher may show each rank a GPU of its own (srun --gpus-per-task, wrappers of mpirun): then there is one to see.

    Raises:
        ValueError: fewer GPUs than ranks on this host.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    own = gpus == 1 and world.launcher != "torchrun"
    if world.local_size > gpus and not own:
        raise ValueError(
            f"{world.local_size} ranks on {world.host} but {gpus} GPUs: start one rank a GPU, "
            f"or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return torch.device("cuda", 0 if own else world.local_rank)


def connect(world: World, store: dist.Store | None, timeout: datetime.timedelta = TIMEOUT) -> torch.device:
    """Join the default process group (NCCL on GPUs, gloo on CPUs; none for a world of one). Collective.

    Args:
        timeout: after which a collective fails, in the default group only: pass it to `new_group` for others.

    Returns:
        The device of this rank, made current.
    """
    device = choose_device(world)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    if store is None:
        return device
    # The machine's own name may resolve slowly, wrongly or not at all. (Runs on GPUs have groups of gloo as well.)
    if world.local_size == world.size:
        loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    allow_files()
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if gpu else None,
    )
    return device


def allow_files() -> None:
    """As many open files as the system permits: gloo has a socket to every other rank, and shells start with 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # no number (macOS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def disconnect() -> None:
    """Leave all process groups. Not collective; call it once all ranks have done their work (`guard` sees to that)."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer that left first may have closed the connection
            dist.destroy_process_group()
