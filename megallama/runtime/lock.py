"""One run for each output folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = "run.lock"


@contextlib.contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, for this process; the kernel lets go of it however the process ends.

    NFS, Lustre and GPFS carry such locks between hosts (Lustre where it is mounted with `flock`).

    Raises:
        ValueError: another run holds it; says which.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir={folder} is in use by {_owner(handle)}; wait for it, stop it, or set another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"{folder}: this file system has no locks; a second run here would not be noticed", file=sys.stderr)
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.time(),
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(me).encode(), 0)
        yield
    finally:
        os.close(handle)


def _owner(handle: int) -> str:
    """Who wrote the lock, in words."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        job = f" of job {found['job']}" if found["job"] else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"another run: process {found['pid']}{job} on {found['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another run, which has just started"
