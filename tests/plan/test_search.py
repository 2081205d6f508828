"""The search finds what trying everything finds; its words, files and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megallama.cli import main
from megallama.config import load
from megallama.plan.advice import explain
from megallama.plan.cluster import load_cluster
from megallama.plan.command import timeline_of
from megallama.plan.job import job_of
from megallama.plan.machine import Machine, fitted
from megallama.plan.memory import job_memory
from megallama.plan.search import GIB, RESERVE, candidates, search
from megallama.plan.step import predict
from megallama.plan.work import block_seconds

RSC = load_cluster("rsc")
MACHINE = Machine(RSC, fitted())
SEVEN = ["--model.preset", "llama2-7b", "--train.global_batch_size", "64"]


def test_the_search_finds_what_trying_everything_finds():
    config = load(SEVEN)
    limit = RSC.memory_gib * GIB * (1 - RESERVE)
    tried = []
    for given in candidates(config, 16, 8):
        job = job_of(given, 16)
        fits = max(part.total for part in job_memory(job)) <= limit
        tried.append((predict(job, MACHINE).seconds, fits))
    found = search(config, 16, MACHINE, 5)
    best = sorted(seconds for seconds, fits in tried if fits)[:5]
    assert [choice.prediction.seconds for choice in found.ranked] == pytest.approx(best)
    assert found.valid == len(tried) > 100
    assert found.roomy.prediction.seconds == min(seconds for seconds, _ in tried)
    assert found.by_tp[found.ranked[0].job.layout.tp].prediction.seconds == found.ranked[0].prediction.seconds
    for choice in found.ranked:
        choice.config.validate(16)
        assert choice.memory <= limit
    lines = explain(found, MACHINE)
    assert lines[0].startswith("Fastest: tp ") and "What binds: " in lines[2] and len(lines) >= 4


def test_nothing_valid_and_nothing_that_fits_are_told():
    with pytest.raises(ValueError, match=r"no layout fits: the leanest needs .* GiB on a GPU, which has 79\.3"):
        search(load(["--model.preset", "llama2-70b", "--train.global_batch_size", "64"]), 8, MACHINE)
    with pytest.raises(ValueError, match="no layout of 37 GPUs is valid for a global batch of 64 samples"):
        search(load(SEVEN), 37, MACHINE)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "a plan"
    assert main(["plan", *SEVEN, "--gpus", "16", "--top", "3", "--explain", "--tokens", "2e12", "--emit", str(folder),
                 "--pictures", str(folder)]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "Fastest: " in told and "What binds" in told and "tCO2eq" in told
    for name in ("timeline.png", "memory.png", "scaling.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    config = load(["--config", str(folder / "train.yaml")])
    config.validate(16)
    assert config.output_dir == str(folder / "run") and config.train.global_batch_size == 64
    script = (folder / "train.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script and f"--config '{folder}/train.yaml'" in script
    assert f"#SBATCH --output='{folder}/slurm-%j.log'\n" in script and f": sbatch '{folder}/train.sbatch'\n" in script
    assert subprocess.run(["bash", "-n", str(folder / "train.sbatch")]).returncode == 0
    title = yaml.safe_load((folder / "train.yaml").read_text())
    assert title["model"]["preset"] == "llama2-7b"


def test_the_timeline_shows_what_is_recomputed():
    job = job_of(load([*SEVEN, "--parallel.recompute", "full", "--parallel.pp", "2"]), 4)
    step, block = timeline_of(job, MACHINE), block_seconds(job, MACHINE)
    assert step.recompute == (16 * block.forward, 16 * block.forward)
    backward = next(event for event in step.events if event.action.kind == "B")
    assert 0 < step.recompute[backward.action.stage] < backward.end - backward.start


def test_brackets_in_names_are_no_markup_and_the_best_alone_is_compared_too(tmp_path: Path, capsys):
    folder = tmp_path / "a[" / "b]"
    arguments = [*SEVEN, "--gpus", "8", "--top", "1", "--explain", "--tokens", "1e9", "--emit", str(folder)]
    assert main(["plan", *arguments]) == 0
    told = capsys.readouterr().out
    assert "The next best is" in told and "b]/train.yaml" in told.replace("\n", "") and "the 1 fastest of" in told
    assert load(["--config", str(folder / "train.yaml")]).train.steps == -(-(10**9) // (64 * 4096))


def test_tensor_parallel_ranks_never_stand_on_two_nodes():
    model = {"num_attention_heads": 36, "num_key_value_heads": 12, "hidden_size": 36 * 128, "intermediate_size": 11520}
    config = load([*SEVEN, *(x for key, value in model.items() for x in (f"--model.{key}", str(value)))])
    sizes = {
        given.parallel.tp
        for given in candidates(replace(config, train=replace(config.train, global_batch_size=72)), 24, 8)
    }
    assert sizes == {1, 2, 4}


def test_json_is_one_object(capsys: pytest.CaptureFixture):
    assert main(["plan", *SEVEN, "--gpus", "8", "--top", "2", "--json", "--cluster", "production"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"] == "production" and len(found["layouts"]) == 2
    best = found["layouts"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["parts"].values()))
    assert 0 < best["mfu"] < 1 and best["memory_gib"] < 79.3
    assert found["run"]["gpu_hours"] == pytest.approx(found["run"]["days"] * 24 * 8)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--cluster", "moon"], "the cluster 'moon' is unknown"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "many"], "invalid int value"),
        (["--out", "x.csv"], "--estimate CSV and --out CSV go together"),
        (["--modle.preset", "x"], "unknown key modle.preset; did you mean model.preset"),
        (["--pue", "0.5"], "pue=0.5 must be at least 1"),
        (["--tokens", "nan"], "--tokens nan must be a number of at least 1"),
        (["--train.dtype", "float32"], "train.dtype=float32 cannot be timed"),
        (["--tokens", "inf"], "--tokens inf must be a number of at least 1"),
    ],
)
def test_bad_options_are_named(arguments: list[str], problem: str, capsys: pytest.CaptureFixture):
    assert main(["plan", *SEVEN, *arguments]) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture):
    assert main(["plan", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--explain" in told and "examples:" in told and "--data.seq_length" in told


def test_planning_needs_no_torch():
    code = "import sys, megallama.plan.command; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
