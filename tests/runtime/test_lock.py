"""The lock on a run's folder. Two real runs on one folder: tests/train/test_pretrain.py."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megallama.runtime.lock import LOCK, sole_owner


def test_names_the_owner_and_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    expected = rf"output_dir={tmp_path} is in use by another run: process {os.getpid()} of job 4711 on \S+ since 20"
    with sole_owner(tmp_path), pytest.raises(ValueError, match=expected), sole_owner(tmp_path):
        pass


def test_is_free_again_and_what_lies_there_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff" * 10_000)
    with sole_owner(tmp_path):
        assert (tmp_path / LOCK).stat().st_size < 500
    with sole_owner(tmp_path):
        pass


def test_an_owner_that_has_not_signed_yet(tmp_path: Path) -> None:
    handle = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run, which has just started"), sole_owner(tmp_path):
        pass
    os.close(handle)


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with sole_owner(tmp_path):
        assert "this file system has no locks" in capsys.readouterr().err
