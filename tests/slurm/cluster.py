"""A real Slurm of several nodes on this machine, for as long as a test runs: munged, slurmctld and one slurmd a node.

    with cluster(Path("/tmp/x"), nodes=2) as slurm:
        job = slurm.submit("--nodes=2", "job.sh")
        assert slurm.wait(job) == Outcome("COMPLETED", 0)

Everything belongs to the current user and lies in one folder, with its own configuration, key and ports, so that a
Slurm which the machine may be part of neither notices nor matters. Nodes are only names: no resolver knows them, all
are at 127.0.0.1, each with its own port.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Where programs are looked for: the daemons lie in folders that not every user's PATH has."""
DAEMONS = ("munged", "slurmctld", "slurmd")
MUNGE_FILES = ("key", "pid", "log", "seed")
COMMANDS = ("sbatch", "srun", "scancel", "scontrol", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
# Processes are found by their parents: no control groups, no accounting, nothing that needs a privilege.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# As many processors as we say, whatever the machine has.
SlurmdParameters=config_overrides
KillWait=10
"""


class Outcome(NamedTuple):
    """How a job ended: Slurm's name of the state and the exit code of its script."""

    state: str
    code: int


def missing() -> list[str]:
    """The programs that a cluster needs and this machine does not have."""
    return [name for name in DAEMONS + COMMANDS if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running Slurm.

    Args:
        folder: its files and its daemons' logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        outer = ("SLURM_", "SBATCH_", "MASTER_")  # of a job in which these tests may run themselves
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *words: str, **env: str) -> str:
        """Run one of Slurm's commands, with additional variables, and return what it printed.

        Raises:
            AssertionError: it failed; says what it wrote.
        """
        done = subprocess.run(words, env=self.env | env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, **env: str) -> int:
        """`sbatch` these options, script and arguments; returns the job's number."""
        return int(self.command("sbatch", "--parsable", *words, **env))

    def wait(self, job: int, timeout: float = 120.0) -> Outcome:
        """How a job has ended, once it has.

        Raises:
            TimeoutError: it is still there after `timeout` seconds; it is cancelled.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            shown = self.command("scontrol", "--oneliner", "show", "job", str(job))
            fields = dict(re.findall(r"(JobState|ExitCode)=(\w+)", shown))
            if fields["JobState"] in ENDED:
                return Outcome(fields["JobState"], int(fields["ExitCode"]))
            time.sleep(0.3)
        self.command("scancel", str(job))
        raise TimeoutError(f"job {job} is {fields['JobState']} after {timeout:.0f} seconds")

    def tasks(self, job: int) -> dict[int, int]:
        """Ranks of a job's srun and the process of each, by the variables that each was started with."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
                pairs = (folder / "environ").read_text(errors="replace").split("\0")
                env = dict(pair.partition("=")[::2] for pair in pairs)
                at_home = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and env.get("SLURM_JOB_ID") == str(job)
                # The batch script and its srun have a task's number too, but not the step's variables.
                if at_home and "SLURM_STEP_TASKS_PER_NODE" in env and "SLURM_STEP_ID" in env:
                    found[int(env["SLURM_PROCID"])] = int(folder.name)
        return found


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """A Slurm of `nodes` idle nodes with `cpus` processors each; at the end its jobs and daemons are ended.

    Args:
        folder: empty or absent; its path must be short (a socket's has at most 107 characters).

    Raises:
        RuntimeError: a daemon does not start; says what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slurm, names = Cluster(folder), [f"node{n}" for n in range(1, nodes + 1)]
    _configure(folder, names, cpus)
    with contextlib.ExitStack() as stack:
        munged = (
            "munged",
            "--foreground",
            "--force",
            *(f"--{kind}-file={folder}/munge.{kind}" for kind in MUNGE_FILES),
        )
        stack.enter_context(_daemon(slurm, "munged", [*munged, f"--socket={folder}/munge.socket"]))
        _until(slurm, lambda: (folder / "munge.socket").exists())
        stack.enter_context(_daemon(slurm, "slurmctld", ["slurmctld", "-D"]))
        for name in names:
            stack.enter_context(_daemon(slurm, name, ["slurmd", "-D", "-N", name]))
        _until(slurm, lambda: _idle(slurm) == nodes)
        try:
            yield slurm
        finally:  # before the daemons, which would leave their jobs running
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                slurm.command("scancel", f"--user={getpass.getuser()}")
                _until(slurm, lambda: _idle(slurm) == nodes)


def _configure(folder: Path, names: Sequence[str], cpus: int) -> None:
    """slurm.conf, and the key by which the daemons know each other."""
    host, (port, *ports) = socket.gethostname(), _free_ports(1 + len(names))
    text = CONF.format(host=host.partition(".")[0], port=port, user=getpass.getuser(), folder=folder)
    for name, port in zip(names, ports, strict=True):
        text += f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"
    text += f"PartitionName=test Nodes={','.join(names)} Default=YES State=UP\n"
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _daemon(slurm: Cluster, name: str, words: Sequence[str]) -> Iterator[None]:
    """A daemon in the foreground of a process of ours, which writes to NAME.log."""
    with (slurm.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(words, env=slurm.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _idle(slurm: Cluster) -> int:
    """Nodes that wait for work; 0 while there is nobody to ask."""
    try:
        return slurm.command("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    except AssertionError:
        return 0


def _until(slurm: Cluster, ready: Callable[[], bool], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(slurm.folder.glob("*.log")))
            raise RuntimeError(f"Slurm did not get ready in {timeout:.0f} seconds\n{logs}")
        time.sleep(0.2)
