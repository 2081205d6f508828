"""What happens when something goes wrong: one line for the whole job, no rank left hanging, and signals heeded.

A failing rank claims the error by an atomic write to the job's store; who comes first speaks, all others stay silent.
So the ranks that fail only because a peer has gone need not be told apart from it: an exception reaches `guard` while
its process still holds its connections, so the claim is there before any peer can miss that process.

Peers are often stuck in a collective, where neither Python nor a signal handler runs. Each rank therefore has a thread
that looks at the store twice a second and ends the process once another rank has claimed an error.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from megallama.runtime.launch import World

POLL = 0.5
"""Seconds between two looks at the store."""
LINGER = 5.0
"""Seconds at most that the first failing rank waits for the others to notice, and they for it to leave."""
PEER_GONE = re.compile(r"gloo/transport/\S+ (.*?(?:Connection closed by peer|Connection reset by peer|Broken pipe))")
"""How gloo says that a process at the other end has died."""
LOST = "lost the rendezvous store: rank 0's process or its host is gone"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it (128 + SIGINT)."""


@contextlib.contextmanager
def guard(
    world: World, store: dist.Store | None, where: Callable[[], str], logs: str | os.PathLike | None = None
) -> Iterator[None]:
    """Around a run: an exception on any rank ends all ranks with exit code 1 and one line on stderr, such as

        megallama: error on rank 3 (host n1, stage 1, step 17): ValueError: …

    Ctrl-C ends them with code 130 and a line. Where nothing fails, no rank leaves before all have come to the end.

    Args:
        store: what `launch.rendezvous` returned (None for a world of one).
        where: what the run is at, for the line: "stage 1, step 17".
        logs: folder of the run's logs; tracebacks are appended to rank_N.log there. Without it, the traceback of the
            speaking rank precedes the line on stderr, unless it is a ValueError (the user's error, which says it all).

    Raises:
        SystemExit: in a world of one; ranks of a larger one are ended at once, without clean-up that could hang.
    """
    watch = None if store is None else Watch(world, store)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        log = _keep_traceback(error, world, logs)
        first = watch is None or watch.claim(code)
        if first:
            _speak(_line(error, world, where, log))
        if watch is None:
            raise SystemExit(code) from None
        watch.linger() if first else watch.notice()
        _leave(world, code)
    else:
        if watch is not None:
            watch.finish()


class Watch:
    """One rank's eye on the job's state, kept in keys of the store: failed, noticed N, left; finished, done."""

    def __init__(self, world: World, store: dist.Store) -> None:
        self._world = world
        # Connections of our own: a wait blocks its connection, and the engine may be in one. (Stubs lack `clone`.)
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._waiting: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._finished = self._noticed = False
        self._over = threading.Event()  # this rank knows of a failure, or is done
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def claim(self, code: int) -> bool:
        """Whether this rank is the first of the job to fail; if so, the others will end with `code`."""
        if self._over.is_set():
            return False
        self._over.set()
        mine = f"{self._world.rank} {code}"
        try:
            return self._store.compare_set("failed", "", mine) == mine.encode()
        except RuntimeError:  # the store is gone, and its host would have spoken had it been able to
            return self._world.rank == 1

    def linger(self) -> None:
        """Having spoken, stay until all others have noticed: this rank may host the store."""
        others = [f"noticed {rank}" for rank in range(self._world.size) if rank != self._world.rank]
        end = time.monotonic() + LINGER
        with contextlib.suppress(RuntimeError):
            while not self._store.check(others) and time.monotonic() < end:
                time.sleep(POLL / 10)
            self._store.set("left", "")
        time.sleep(POLL / 2)

    def notice(self) -> None:
        """Tell the first failing rank that this one knows, and let it leave first: launchers blame the first to go."""
        if self._noticed:  # by the other thread of this rank, which ends the process in a moment
            time.sleep(2 * LINGER)
        self._noticed = True
        with contextlib.suppress(RuntimeError):
            self._store.set(f"noticed {self._world.rank}", "")
            self._store.wait(["left"], datetime.timedelta(seconds=LINGER))
        time.sleep(POLL)

    def finish(self) -> None:
        """Wait until all ranks are here. A rank that fails meanwhile ends this one."""
        self._finished = True
        with contextlib.suppress(RuntimeError):  # the host may leave as soon as all are here
            if self._store.add("finished", 1) == self._world.size:
                self._store.set("done", "")
            self._waiting.wait(["done"], datetime.timedelta(days=1))
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(POLL):
            try:
                if not self._store.check(["failed"]):
                    continue
                code = int(self._store.get("failed").split()[1])
            except RuntimeError:
                return None if self._finished else self._lost()
            if not self._over.is_set():
                self._over.set()
                self.notice()
                _leave(self._world, code)

    def _lost(self) -> None:
        time.sleep(POLL)  # this rank may be about to fail by itself, and then it speaks
        if not self._over.is_set():
            if self._world.rank == 1:
                _speak(f"megallama: error on rank 1 (host {self._world.host}): {LOST}")
            _leave(self._world, 1)


def _keep_traceback(error: BaseException, world: World, logs: str | os.PathLike | None) -> Path | None:
    """Append the traceback to this rank's log; None where there is no log, or no need or way to write it."""
    if logs is None or isinstance(error, KeyboardInterrupt):
        return None
    file = Path(logs) / f"rank_{world.rank}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            traceback.print_exception(error, file=out)
    except OSError:
        return None
    return file


def _line(error: BaseException, world: World, where: Callable[[], str], log: Path | None) -> str:
    """Our one line about an error; before it the traceback, where no log has it and the line cannot say it all."""
    place = f"host {world.host}"
    with contextlib.suppress(Exception):  # the state that `where` reads may not exist yet
        place += f", {at}" if (at := where()) else ""
    if isinstance(error, KeyboardInterrupt):
        return f"megallama: interrupted on rank {world.rank} ({place})"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if gone := PEER_GONE.search(text):
        text = f"lost a peer, which was killed or ran out of memory ({gone[1]})"
    line = f"megallama: error on rank {world.rank} ({place}): {text}"
    if isinstance(error, ValueError):
        return line
    if log is not None:
        return f"{line} (traceback in {log})"
    return "".join(traceback.format_exception(error)) + line


def _speak(text: str) -> None:
    """One write, so that lines of several processes do not mix; on a terminal, below the bar that stands there."""
    start = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}{text}\n")
    sys.stderr.flush()


def _leave(world: World, code: int) -> None:
    """End this process now: nothing that could wait for a lost peer runs. MPI ends the rest of its job as well."""
    with contextlib.suppress(Exception):
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
        sys.stdout.flush()
        sys.stderr.flush()
    if world.launcher == "mpirun" and "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    os._exit(code)


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first Ctrl-C into a flag that the training loop reads at the end of a step.

    So a preempted job can save before it leaves. A second Ctrl-C interrupts at once. The signal may reach only some
    ranks, and between different steps: reduce the flag (maximum) over all ranks before acting on it.

        with StopSignal() as stop:
            for step in steps:
                ...
                if any_rank(stop): save(); break
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.name = ""
        """Name of the signal that came ("" = none yet)."""

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
