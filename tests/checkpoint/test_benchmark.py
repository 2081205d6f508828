"""The benchmark of checkpoints, run as its users do on a state of a megabyte."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

from megallama.model.canonical import canonical_shapes

TOOL = Path(__file__).parents[2] / "tools" / "benchmark" / "checkpoint.py"
CONTESTS = {
    "save": (["raw", "raw, reserved"], ["megallama", "dcp", "dcp, 2 threads"]),
    "load, warm": (["raw"], ["megallama", "dcp"]),
    "load, cold": (["raw"], ["megallama", "dcp"]),
    "blocked": (["memcpy"], ["megallama", "megallama async", "dcp", "dcp async", "dcp async, until staged"]),
}
"""Title -> (bounds, some of the others)."""


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    result = benchmark("--gigabytes", 0.001, "--rounds", 2, "--folder", disk, "--json", tmp_path / "report.json")
    assert result.returncode == 0, result.stderr
    assert not result.stderr and not list(disk.iterdir()), "it leaves warnings or files behind"
    assert "both have loaded what was saved, bit by bit" in result.stdout

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rounds"] == 2 and report["threads"] == 1 and report["bytes"] == pytest.approx(1e6, rel=0.01)
    assert set(report["from_disk"]) == {"raw", "megallama", "dcp"}
    assert set(report["contests"]) == set(CONTESTS)
    for title, (bounds, others) in CONTESTS.items():
        entrants = report["contests"][title]
        assert {*bounds, *others} <= set(entrants), title
        fastest = min((name for name in entrants if name.startswith("dcp")), key=lambda n: entrants[n]["seconds"])
        for name, entry in entrants.items():
            assert f"\n{name:30}{entry['seconds']:8.3f}" in result.stdout
            assert len(entry["rounds"]) == 2 and min(entry["rounds"]) > 0
            assert entry["seconds"] == median(entry["rounds"])
            assert entry["gigabytes_per_second"] == pytest.approx(report["bytes"] / entry["seconds"] / 1e9)
            assert list(entry["of"]) == [*bounds, fastest], "compared with something else than the bounds and the best"
            for reference, ratio in entry["of"].items():
                parts = zip(entrants[reference]["rounds"], entry["rounds"], strict=True)
                assert ratio == pytest.approx(median(theirs / own for theirs, own in parts))


@pytest.mark.slow
def test_errors_are_one_line(tmp_path: Path) -> None:
    result = benchmark("--folder", tmp_path / "nowhere")
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == f"checkpoint: error: there is no folder {tmp_path / 'nowhere'}; make it first\n"


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    spec = spec_from_file_location("checkpoint_benchmark", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gigabytes", "rounds", "report", "message"),
    [
        (0.0, 5, "report.json", "--gigabytes 0.0 must be at least 0.001"),
        (float("nan"), 5, "report.json", "--gigabytes nan must be at least 0.001"),
        (1.0, 0, "report.json", "--rounds 0 at least 1"),
        (1e6, 5, "report.json", "--gigabytes 1e+06 takes 8000000.0 GB of memory, but there are"),
        (0.001, 5, "nowhere/report.json", "nowhere; make it first"),
    ],
)
def test_options_that_make_no_sense(
    tool: ModuleType, tmp_path: Path, gigabytes: float, rounds: int, report: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tool.measure(gigabytes, rounds, tmp_path, tmp_path / report)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gigabytes", [0.001, 0.1, 1.0, 30.0])
def test_the_state_has_the_size_that_was_asked_for(tool: ModuleType, gigabytes: float) -> None:
    shapes = canonical_shapes(tool.model_of(gigabytes)).values()
    assert 12 * sum(map(math.prod, shapes)) == pytest.approx(gigabytes * 1e9, rel=0.01)
