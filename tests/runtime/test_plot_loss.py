"""The loss plot: smoothing by hand, and the tool from its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "plot_loss.py"


def run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True, timeout=200)


def record(folder: Path, losses: list[float | None]) -> Path:
    folder.mkdir()
    rows = [{"step": n, "loss": x, "lr": 1e-3, "grad_norm": 1.0} for n, x in enumerate(losses, 1)]
    rows[-1]["valid_loss"] = 2.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_picture_of_two_runs(tmp_path):
    a, b = record(tmp_path / "a", [3.0, None, 2.5]), record(tmp_path / "b", [3.0, 2.9, 2.4])
    picture = tmp_path / "new" / "loss.png"
    done = run(a, b / "metrics.jsonl", "--output", picture, "--reference", "unigram entropy=2.7")
    assert done.returncode == 0, done.stderr
    first, second, wrote = done.stdout.splitlines()
    assert first == f"{a}: validation loss 2.000 at step 3, 0.700 below unigram entropy (2.700)"
    assert second.startswith(f"{b / 'metrics.jsonl'}: validation loss 2.000 at step 3")
    assert wrote == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_run_without_a_loss_is_one_clear_line(tmp_path):
    empty = record(tmp_path / "a", [None])
    done = run(empty, "--output", tmp_path / "x.png")
    assert (done.returncode, done.stderr) == (1, f"plot_loss: error: no step with a loss in {empty}\n")
    assert not (tmp_path / "x.png").exists()


def test_smoothing_does_not_lag(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from plot_loss import smoothed

    line = [9.0 - n for n in range(9)]
    assert smoothed(line, 5) == pytest.approx(line)
    assert smoothed([0.0, 3.0, 0.0, 3.0], 3) == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert smoothed([1.0, 5.0], 0) == [1.0, 5.0]
