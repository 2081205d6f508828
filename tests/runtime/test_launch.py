"""The rank resolver, from the variables that each launcher sets."""

from __future__ import annotations

import resource
import socket

import pytest
import torch

from megallama.runtime import launch
from megallama.runtime.launch import World, choose_device, hosts, resolve, slurm_port, tasks_on_node

HOST = socket.gethostname()
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "6", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
BATCH = {  # what a batch script of 2 nodes has
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "7",
    "SLURM_NODEID": "0",
}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, World(0, 1, 0, 1, HOST, "bare")),
        (TORCHRUN, World(5, 8, 1, 4, HOST, "torchrun")),
        (OPEN_MPI, World(3, 4, 1, 2, HOST, "mpirun")),
        (HYDRA, World(2, 6, 2, 3, HOST, "mpirun")),
        (SRUN, World(6, 7, 2, 3, HOST, "srun")),
        (BATCH, World(0, 1, 0, 1, HOST, "bare")),
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, World(0, 1, 0, 1, HOST, "bare")),  # an interactive shell
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, World(0, 1, 0, 1, HOST, "bare")),  # a batch script
        (SRUN | TORCHRUN, World(5, 8, 1, 4, HOST, "torchrun")),  # torchrun as srun's task
        (SRUN | HYDRA, World(2, 6, 2, 3, HOST, "mpirun")),  # mpirun starts its daemons by srun
        (SRUN | {"PMI_RANK": "6", "PMI_SIZE": "7"}, World(6, 7, 2, 3, HOST, "srun")),  # srun --mpi=pmi2
    ],
)
def test_resolve(env, expected):
    assert resolve(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun .* did not set LOCAL_RANK, LOCAL_WORLD_SIZE"),
        (TORCHRUN | {"RANK": "8"}, "impossible place: RANK=8, WORLD_SIZE=8"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "impossible place"),
    ],
)
def test_resolve_says_what_is_wrong(env, message):
    with pytest.raises(ValueError, match=message):
        resolve(env)


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("login1", ["login1"]),
        ("n1,n2", ["n1", "n2"]),
        ("node[001-003,007]", ["node001", "node002", "node003", "node007"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("a[1,3],b-2,c[01-02].site", ["a1", "a3", "b-2", "c01.site", "c02.site"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
    ],
)
def test_node_lists(nodelist, expected):
    assert hosts(nodelist) == expected


@pytest.mark.parametrize(("node", "tasks"), [(0, 4), (1, 4), (2, 3), (3, 1)])
def test_tasks_on_node(node, tasks):
    assert tasks_on_node({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1", "SLURM_NODEID": str(node)}) == tasks


def test_slurm_ports_are_unprivileged_and_below_the_ephemeral_range():
    ports = {slurm_port({"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)}) for j in range(100) for s in range(3)}
    assert len(ports) > 290 and min(ports) > 1024 and max(ports) < 32768


@pytest.mark.parametrize(
    ("gpus", "launcher", "expected"),
    [
        (0, "torchrun", torch.device("cpu")),
        (4, "torchrun", torch.device("cuda", 2)),
        (8, "srun", torch.device("cuda", 2)),
        (1, "srun", torch.device("cuda", 0)),  # --gpus-per-task=1 hides the others
    ],
)
def test_choose_device(monkeypatch, gpus, launcher, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(World(2, 4, 2, 4, "n1", launcher)) == expected


def test_more_ranks_than_gpus_is_a_users_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 ranks on n1 but 2 GPUs: start one rank a GPU"):
        choose_device(World(2, 4, 2, 4, "n1", "torchrun"))


def test_a_world_of_one_makes_no_process_group(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.rendezvous(World()) is None
    assert launch.connect(World(), None) == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    launch.disconnect()


def test_ranks_without_an_address_are_told_to_set_one(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="set MASTER_ADDR and MASTER_PORT"):
        launch.rendezvous(World(0, 2, 0, 2, "n1", "torchrun"))


def test_as_many_files_as_the_system_permits() -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before, 256), most))
    try:
        launch.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
