"""Real jobs under real launchers: whatever happens, they end, with one line of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import failing_job
import pytest
import torch

from distributed import PRELOAD
from megallama.runtime.faults import StopSignal, guard
from megallama.runtime.launch import World

ROOT = Path(__file__).parents[2]
JOB = str(Path(__file__).with_name("failing_job.py"))
SCRIPTS = Path(sys.executable).parent
LINE = "megallama: error on rank {} (host {}, stage 0, step 17): RuntimeError: planted (traceback in {})"
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))} | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def torchrun(*args: str) -> tuple[list[int], str]:
    return launcher(str(SCRIPTS / "torchrun"), "--nproc-per-node", "2", JOB, *args)


def mpirun(*args: str) -> tuple[list[int], str]:
    return launcher(str(SCRIPTS / "mpirun"), "-n", "2", sys.executable, JOB, *args)


def launcher(*command: str) -> tuple[list[int], str]:
    """The launcher's exit code, and all that it and its processes wrote."""
    done = subprocess.run(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    return [done.returncode], done.stdout


def srun(*args: str, ranks: int = 2) -> tuple[list[int], str]:
    """Tasks with the variables that srun sets, on one node; as with the real one by default, nobody ends them.

    They are forked from a server that has imported torch: they start at once.
    """
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": str(time.monotonic_ns() % 1000), "SLURM_NODEID": "0"}
    job |= {"SLURM_STEP_NODELIST": "node[7]", "SLURM_NTASKS": str(ranks), "SLURM_STEP_TASKS_PER_NODE": str(ranks)}
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.NamedTemporaryFile("r") as output:
        tasks = [
            context.Process(
                target=task, args=(job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}, output.name, args)
            )
            for rank in range(ranks)
        ]
        for each in tasks:
            each.start()
        end = time.monotonic() + 100
        for each in tasks:
            each.join(max(0.0, end - time.monotonic()))
            each.kill()
            each.join()
        return [each.exitcode for each in tasks], output.read()


def task(env: dict[str, str], output: str, args: tuple[str, ...]) -> None:
    """One such task, in a new process: from here on it writes to the file `output`."""
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [JOB, *args]
    failing_job.main()


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("megallama:")]


LAUNCHERS = [
    torchrun,
    srun,
    pytest.param(
        mpirun,
        marks=[
            pytest.mark.mpi,
            pytest.mark.skipif(not (SCRIPTS / "mpirun").exists(), reason="no mpirun beside this Python"),
        ],
    ),
]
HOSTNAME = os.uname().nodename


@pytest.mark.parametrize("run", LAUNCHERS)
def test_an_error_on_one_rank_ends_all_with_one_line(run, tmp_path):
    codes, text = run("one", str(tmp_path))
    assert ours(text) == [LINE.format(1, HOSTNAME, tmp_path / "rank_1.log")]
    assert 0 not in codes
    assert 'raise RuntimeError("planted")' in (tmp_path / "rank_1.log").read_text()


@pytest.mark.parametrize("run", LAUNCHERS)
def test_all_ranks_leave_a_good_run_quietly(run):
    codes, text = run("fine")
    assert set(codes) == {0}
    assert text.count("left ") == 2 and text.count("sum 2") == 2
    assert not ours(text) and "Traceback" not in text and "Warning" not in text


def test_an_error_on_the_rank_that_hosts_the_store(tmp_path):
    codes, text = srun("zero", str(tmp_path))
    assert ours(text) == [LINE.format(0, HOSTNAME, tmp_path / "rank_0.log")]
    assert codes == [1, 1]


def test_a_users_error_on_all_ranks_is_said_once(tmp_path):
    codes, text = srun("user", str(tmp_path))
    (line,) = ours(text)
    assert line.endswith("step 17): ValueError: data.sources is empty: give at least one")
    assert codes == [1, 1]


def test_a_rank_that_fails_when_the_others_have_finished(tmp_path):
    codes, text = srun("late", str(tmp_path))
    assert ours(text) == [LINE.format(1, HOSTNAME, tmp_path / "rank_1.log")]
    assert codes == [1, 1] and "left" not in text


@pytest.mark.parametrize(("mode", "killed"), [("kill", 2), ("kill-zero", 0)])
def test_a_killed_rank_is_missed_and_said_once(mode, killed, tmp_path):
    codes, text = srun(mode, str(tmp_path), ranks=3)
    (line,) = ours(text)
    assert "lost a peer" in line or "lost the rendezvous store" in line
    assert [code for rank, code in enumerate(codes) if rank != killed] == [1, 1]
    assert codes[killed] == -signal.SIGKILL


def test_an_interrupt_has_its_own_code():
    codes, text = srun("interrupt")
    assert ours(text) == [f"megallama: interrupted on rank 1 (host {HOSTNAME}, stage 0, step 17)"]
    assert codes == [130, 130]


def test_one_process_says_where_it_failed_and_shows_the_traceback_if_no_log_has_it(capsys):
    def fail(error: Exception) -> str:
        with pytest.raises(SystemExit) as caught, guard(World(host="n1"), None, lambda: "step 17"):
            raise error
        assert caught.value.code == 1
        return capsys.readouterr().err

    text = fail(RuntimeError("planted"))
    assert text.startswith("Traceback") and "raise error" in text
    assert ours(text) == ["megallama: error on rank 0 (host n1, step 17): RuntimeError: planted"]
    assert fail(ValueError("a\n  b")) == "megallama: error on rank 0 (host n1, step 17): ValueError: a b\n"


def test_a_failure_before_the_state_exists_is_still_told(capsys):
    with pytest.raises(SystemExit), guard(World(host="n1"), None, lambda: str(1 // 0)):
        raise ValueError("early")
    assert capsys.readouterr().err == "megallama: error on rank 0 (host n1): ValueError: early\n"


def test_stop_signal_is_a_flag_first_and_an_interrupt_after():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
