"""Pretraining under a real srun and sbatch, on two nodes of a Slurm of ours whose names nothing resolves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster import Cluster, Outcome, cluster, missing

from megallama.config import load
from megallama.data import IndexedWriter
from megallama.plan.cluster import load_cluster
from megallama.plan.emit import emit
from megallama.runtime.launch import node_address
from megallama.runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "pretrain.sbatch")
OVERRIDES = ("--gpus-per-node=0", "--cpus-per-task=1", "--nodes=2")  # what these nodes do not have
STEPS, VOCAB = 100, 37
PRETRAIN = ("python", "-m", "megallama", "pretrain", "--config")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())} (Debian: slurm-wlm, munge)"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Two nodes; jobs take this Python and this package."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with cluster(folder) as running:
        running.env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        running.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), running.env["PATH"]])
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds, on documents that count upwards."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "data", "u2") as writer:
        for _ in range(100):
            writer.add_document((random.integers(VOCAB) + np.arange(40)) % VOCAB)
    file = folder / "run.yaml"
    sections = {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 16,
        },
        "data": {"sources": [{"prefix": str(folder / "data")}], "seq_length": 16, "split": 0.0},
        "train": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4, "dtype": "float64"},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


@pytest.fixture(scope="module")
def straight(slurm: Cluster, config: Path) -> list[float]:
    """Losses of the run by srun from the command line, one task on each of two nodes, without a break."""
    output = str(config.parent / "straight")
    srun = ("srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1")
    slurm.command(*srun, *PRETRAIN, str(config), "--parallel.tp", "2", "--output_dir", output)
    return losses(output)


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)]


def submit(slurm: Cluster, tasks_per_node: int, *words: str) -> tuple[int, Path]:
    """Number and log of a job of the example's script on both nodes."""
    log = f"{slurm.folder}/job-%j.txt"
    job = slurm.submit(*OVERRIDES, f"--ntasks-per-node={tasks_per_node}", f"--output={log}", SCRIPT, *words)
    return job, Path(log.replace("%j", str(job)))


def until(met: Callable[[], object], timeout: float = 100.0) -> None:
    end = time.monotonic() + timeout
    while not met():
        assert time.monotonic() < end, f"not within {timeout:.0f} seconds"
        time.sleep(0.02)


def test_srun_trains_as_one_process_does(slurm: Cluster, config: Path, straight: list[float]) -> None:
    output = config.parent / "bare"
    slurm.command(*PRETRAIN, str(config), "--output_dir", str(output))
    assert len(straight) == STEPS
    assert straight[-1] < 0.9 * straight[0]
    assert straight == pytest.approx(losses(output), rel=1e-10)


def test_a_script_that_the_planner_writes_trains_whatever_its_folder_is_called(
    slurm: Cluster, config: Path, straight: list[float], tmp_path: Path
) -> None:
    folder = tmp_path / "a plan"
    given = load(["--config", str(config), "--parallel.tp", "2"])
    emit(given, 2, replace(load_cluster("rsc"), gpus_per_node=1), folder, "two nodes")
    job = slurm.submit(*OVERRIDES, f"{folder}/train.sbatch")
    outcome, log = slurm.wait(job), folder / f"slurm-{job}.log"
    assert outcome == Outcome("COMPLETED", 0), log.read_text()
    assert losses(folder / "run") == straight


def test_a_signal_makes_the_batch_job_save_and_the_next_one_goes_on(
    slurm: Cluster, config: Path, straight: list[float]
) -> None:
    output = config.parent / "batch"
    words = (str(config), "--parallel.tp", "2", "--output_dir", str(output))
    job, log = submit(slurm, 1, *words)
    until(lambda: (output / "metrics.jsonl").exists() and losses(output))
    slurm.command("scancel", "--signal=USR1", str(job))  # as --signal does before the time limit
    assert slurm.wait(job) == Outcome("COMPLETED", 0), log.read_text()
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", log.read_text())
    assert stopped and 0 < int(stopped[1]) < STEPS, log.read_text()
    assert len(losses(output)) == int(stopped[1])

    job, log = submit(slurm, 1, *words)
    assert slurm.wait(job) == Outcome("COMPLETED", 0), log.read_text()
    assert f"step {stopped[1]}, {4 * int(stopped[1])} samples consumed" in log.read_text()
    assert losses(output) == straight, "the run in two jobs is not bitwise the run in one"


def test_a_killed_rank_ends_the_job(slurm: Cluster, config: Path) -> None:
    output = config.parent / "killed"
    words = (str(config), "--parallel.tp", "2", "--train.steps", "1000000", "--output_dir", str(output))
    job, log = submit(slurm, 2, *words)
    until(lambda: (output / "metrics.jsonl").exists() and losses(output))
    tasks = slurm.tasks(job)
    assert sorted(tasks) == [0, 1, 2, 3]
    os.kill(tasks[3], signal.SIGKILL)
    outcome = slurm.wait(job, timeout=30)
    assert outcome.state == "FAILED" and outcome.code != 0, log.read_text()
    until(lambda: not slurm.tasks(job), 10)
    assert sum(line.startswith("megallama:") for line in log.read_text().splitlines()) <= 1, log.read_text()


def test_a_users_error_is_said_once_and_fails_the_job(slurm: Cluster, config: Path) -> None:
    job, log = submit(slurm, 2, str(config), "--parallel.tq", "2")
    assert slurm.wait(job) == Outcome("FAILED", 2), log.read_text()
    assert log.read_text().count("parallel.tq") == 1


def test_the_batch_script_asks_for_a_configuration(slurm: Cluster) -> None:
    job, log = submit(slurm, 1)
    assert slurm.wait(job) == Outcome("FAILED", 2)
    assert log.read_text().startswith("usage: sbatch")


def test_slurm_tells_addresses_that_no_resolver_knows(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.env[name])
    assert node_address("localhost") == "localhost"
    assert node_address("node1") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"first node, node9\.invalid, does not resolve .* set MASTER_ADDR"):
        node_address("node9.invalid")


def test_nothing_of_a_cluster_remains(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        with cluster(Path(folder), nodes=1) as slurm:
            job = slurm.submit("--wrap=srun sleep 60", f"--output={folder}/job.txt")
            until(lambda: slurm.tasks(job), 20)
            (task,) = slurm.tasks(job).values()
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert folder not in listed
        assert not Path(f"/proc/{task}").exists()
