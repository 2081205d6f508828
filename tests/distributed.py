"""Run a function on several gloo ranks from a test, and get every rank's result back.

    def total(rank, world, x):            # a top-level function: ranks import it by name
        t = torch.tensor(float(x + rank))
        dist.all_reduce(t)
        return t

    assert run_ranks(2, total, 1.0) == [3.0, 3.0]

    with Ranks(4) as ranks:               # many cases in one group: no process is started anew
        for case in CASES:
            ranks.run(train, case)

Import it as `from distributed import Ranks, run_ranks`: pytest's `pythonpath = [".", "tests"]` puts this folder on
sys.path, ranks inherit sys.path, and so they find this module, the package and the test's own module. Test folders have
no `__init__.py`; a test module is top-level by its file name, which must be unique in the whole suite.

Ranks are forked from a server that has imported torch already, so a group starts in a fraction of a second. They
compute on one thread, see the environment that the first group of the process was started in (later changes, as by
`monkeypatch.setenv`, do not reach them), and exchange pickles: pass small arguments and return small results.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PRELOAD = ["torch", "torch.distributed", "numpy", "pytest"]
GLOO_TIMEOUT = datetime.timedelta(seconds=60)
GRACE = 0.3
"""Seconds that the other ranks get to report, once one has failed, before all are killed."""


class RankError(RuntimeError):
    """A rank failed: the text names the rank and carries its own traceback."""


class RankTimeout(RankError):
    """The ranks did not finish in time: the text carries every rank's stack."""


def run_ranks(world: int, fn: Callable[..., T], *args: Any, timeout: float = 120) -> list[T]:
    """`fn(rank, world, *args)` on `world` ranks of a fresh gloo group; results in rank order.

    See `Ranks.run` for what it raises. `world` 1 is a plain call in this process, without a process group.
    """
    with Ranks(world) as ranks:
        return ranks.run(fn, *args, timeout=timeout)


def forkserver() -> Any:
    """What starts processes that need not import torch anew."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Ranks:
    """A gloo group of `world` ranks that runs one function after another."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: Path | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(5)
        self._kill()

    def run(self, fn: Callable[..., T], *args: Any, timeout: float = 120) -> list[T]:
        """`fn(rank, world, *args)` on every rank; results in rank order.

        A failure ends the group; the next call starts a new one.

        Raises:
            The exception of the rank that failed first, caused by a RankError with the rank and its traceback.
            RankError: a rank died, or its exception cannot be pickled.
            RankTimeout: `timeout` seconds went by.
        """
        if self.world == 1:
            return [fn(0, 1, *args)]
        work = pickle.dumps((fn, args))
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(work)
            return self._collect(timeout)
        except BaseException:
            self._kill()
            raise

    def _start(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = forkserver()
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, str(self._folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self.world
        failures: list[tuple[float, int, BaseException | None, str]] = []
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    good, answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:  # a dead rank comes before the peers that miss it
                    self._processes[rank].join(1)
                    failures.append((0.0, rank, None, f"the process died: exit code {self._processes[rank].exitcode}"))
                    good = None
                if good:
                    results[rank] = answer
                elif good is not None:
                    failures.append((answer[0], rank, *answer[1:]))
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            _, rank, error, text = min(failures, key=lambda failure: failure[:2])
            cause = RankError(f"rank {rank} of {self.world} failed first:\n{text}")
            raise cause if error is None else error from cause
        if waiting:
            missing = sorted(waiting.values())
            raise RankTimeout(f"ranks {missing} of {self.world} not done after {timeout:g} s\n{self._stacks(missing)}")
        return results

    def _stacks(self, ranks: list[int]) -> str:
        assert self._folder is not None, "stacks are asked of running ranks"
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR2)
        time.sleep(GRACE)
        files = [(rank, self._folder / f"stack_{rank}") for rank in ranks]
        return "\n".join(f"rank {rank}:\n{file.read_text() if file.exists() else '(none)'}" for rank, file in files)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None


def _serve(rank: int, world: int, folder: str, pipe: connection.Connection) -> None:
    """A rank's life: join the group, then run what comes until an empty message."""
    torch.set_num_threads(1)
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()  # no look-up of the machine's own name, which may hang
    with open(os.path.join(folder, f"stack_{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
        joined = False
        while work := _receive(pipe):
            try:
                if not joined:
                    rendezvous = f"file://{folder}/rendezvous"
                    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world, timeout=GLOO_TIMEOUT)
                    joined = True
                fn, args = pickle.loads(work)
                answer = pickle.dumps((True, fn(rank, world, *args)))
            except BaseException as error:
                answer = _failure(error)
            pipe.send_bytes(answer)
        if joined:
            dist.destroy_process_group()


def _receive(pipe: connection.Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError:  # the test's process is gone
        return b""


def _failure(error: BaseException) -> bytes:
    """(False, (when, exception or None, traceback)) as a pickle; None where the exception does not survive pickling."""
    now, text = time.monotonic(), traceback.format_exc()
    with contextlib.suppress(Exception):
        packed = pickle.dumps((False, (now, error, text)))
        pickle.loads(packed)
        return packed
    return pickle.dumps((False, (now, None, text)))
