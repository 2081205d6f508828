"""The loop over versions with less of everything: it goes on after a kill, and by rules V5 beats SFT, the control does
not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_versions_rise_and_the_control_does_not(tmp_path: Path) -> None:
    out = tmp_path / "seed_1"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(out),
        "REDUCED": "1",
        "BOTH": "python -m megallama",  # on two cores, starting two processes takes longer than it saves here
    }
    line = ["bash", str(ROOT / "examples" / "llama2_chat" / "run.sh"), "1"]
    first = subprocess.Popen(line, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    patience = time.monotonic() + 300
    while not (out / "sft" / "metrics.jsonl").exists() and time.monotonic() < patience and first.poll() is None:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (out / "sft" / "complete").exists()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[skip] pretrain" in done.stdout
    assert "v5 beats sft, and control does not" in done.stdout
    assert (out / "versions.png").read_bytes().startswith(b"\x89PNG")
