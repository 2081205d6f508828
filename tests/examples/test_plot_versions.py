"""The verdict over a chat model's versions: what rises, what must not, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def judged(folder: Path, level: float, count: int = 60, safety: bool = True) -> Path:
    """A version whose score by rules is about `level`."""
    draw = random.Random(folder.name)
    (folder / "parts").mkdir(parents=True)
    lines = [
        {"helpfulness": draw.gauss(level, 1), "safety": draw.gauss(0, 1) if safety else None} for _ in range(count)
    ]
    (folder / "parts" / "part_00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rules = {f"p{n}": min(1.0, max(0.0, draw.gauss(level, 0.1))) for n in range(count)}
    (folder / "rules.json").write_text(json.dumps({"by_prompt": rules}))
    return folder


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plot_versions.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_rise_that_the_control_does_not_have(tmp_path):
    versions = [judged(tmp_path / f"judged_v{n}", 0.3 + 0.1 * n) for n in range(4)]
    control = judged(tmp_path / "judged_control", 0.3)
    done = tool(*versions, "--control", control, "--output", tmp_path / "versions.png")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "v3 beats v0, and control does not" in done.stdout
    assert (tmp_path / "versions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "last, control, words", [(0.3, 0.3, "is not better than v0"), (0.6, 0.5, "the control is better")]
)
def test_what_does_not_hold_is_told_by_the_exit_code(tmp_path, last, control, words):
    versions = [judged(tmp_path / "judged_v0", 0.3), judged(tmp_path / "judged_v1", last, safety=False)]
    done = tool(*versions, "--control", judged(tmp_path / "control", control), "--output", tmp_path / "v.png")
    assert done.returncode == 1 and words in done.stdout


def test_incomplete_folders_are_named(tmp_path):
    whole = judged(tmp_path / "judged_v0", 0.3)
    (tmp_path / "empty").mkdir()
    done = tool(whole, tmp_path / "empty", "--output", tmp_path / "v.png")
    assert done.returncode == 1 and "empty is no judged version" in done.stderr and not (tmp_path / "v.png").exists()
    done = tool(whole, "--output", tmp_path / "v.png")
    assert done.returncode == 1 and "at least two versions" in done.stderr
