"""Settings of every test: one compute thread a process, since the ranks of a test share two cores."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also read by the processes that tests start


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One compute thread, but only where a test module has imported torch: the torch-free ones start at once."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
