"""PPO on the real models: the same run in every layout, after a kill, and what must not move."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from alignment_world import LAYOUTS, World, config_of, differences, make_world, write_records

from distributed import Ranks
from megallama.alignment import JudgesConfig, PpoConfig
from megallama.checkpoint.checkpointer import checkpoint_folders
from megallama.config import Config, dump
from megallama.parallel.pieces import views
from megallama.rlhf.ppo import models
from megallama.rlhf.ppo.rewards import whiten
from megallama.rlhf.ppo.rollout import kl_of_rows
from megallama.rlhf.ppo.run import PpoRun
from megallama.runtime.mesh import build_mesh
from megallama.runtime.metrics import read_metrics
from megallama.train.models import open_weights
from megallama.train.residence import Residence
from megallama.train.run import run_folder
from megallama.train.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("ppo"))


def ppo_config(world: World, name: str, layout: tuple[int, int, int] = (1, 1, 1), **section) -> Config:
    config = config_of(world, name, layout)
    ppo = PpoConfig(
        prompts=str(world.prompts), valid_prompts=str(world.prompts), rollouts=16, max_new_tokens=12, **section
    )
    return replace(
        config,
        ppo=ppo,
        judges=JudgesConfig(str(world.judges[0]), str(world.judges[1]), watch=str(world.judges[0])),
        train=replace(config.train, steps=4),
        optim=replace(config.optim, lr=1e-3, schedule="constant"),
        checkpoint=replace(config.checkpoint, interval=1),
    )


def open_run(config: Config) -> PpoRun:
    model, parallel = config.model, config.parallel
    return PpoRun(
        config, build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    )


def go(rank: int, size: int, config: Config) -> list[dict]:
    run = open_run(config)
    with run_folder(config, run.mesh):
        run.run()
    return read_metrics(config.output_dir) if rank == 0 else []


def fingerprint(trainer: Trainer) -> str:
    total = hashlib.sha256()
    for stage in trainer.stages.values():
        for _, view in views(stage):
            total.update(view.contiguous().numpy().tobytes())
    return total.hexdigest()


def weights(folder: Path) -> bytes:
    return b"".join(sorted(path.read_bytes() for path in folder.glob("*.safetensors")))


def test_every_layout_sees_the_same_run(world):
    runs = {}
    for layout in LAYOUTS:
        with Ranks(layout[0] * layout[1] * layout[2]) as ranks:
            runs[layout] = ranks.run(go, ppo_config(world, "layouts", layout))[0]
    alone = runs.pop((1, 1, 1))
    keys = {"reward_mean", "kl", "entropy", "clip_fraction", "ratio", "length_mean", "reward_decile_1", "valid_watch",
            "explained_variance", "finished", "safety_mean", "valid_reward"}  # fmt: skip
    assert keys <= set(alone[-1]) and [record["step"] for record in alone] == [0, 1, 2, 3, 4]
    for layout, run in runs.items():
        assert all(record["generator_gap"] < 1e-9 for record in run[1:]), "the generator has stale weights"
        assert differences(alone, run) < 1e-6, layout


def test_the_first_update_starts_at_ratio_one_and_without_kl(world):
    run = open_run(ppo_config(world, "first"))
    before = fingerprint(run.models.reference)
    records = [run.ppo.iterate(iteration)[0] for iteration in (1, 2, 3)]
    assert [record["first_ratio"] for record in records] == [1.0, 1.0, 1.0]
    assert records[0]["kl"] == 0.0 and records[2]["kl"] != 0.0
    assert all(record["generator_gap"] < 1e-9 for record in records), "the generator has stale weights"
    assert fingerprint(run.models.reference) == before, "the reference has moved"
    assert fingerprint(run.models.actor) != before


def test_all_log_probabilities_are_at_the_sampling_temperature(world):
    """Forgotten in the trainer, it would show here: the generator divides by itself."""
    run = open_run(ppo_config(world, "temperature", temperature=0.7))
    records = [run.ppo.iterate(iteration)[0] for iteration in (1, 2)]
    assert all(record["generator_gap"] < 1e-9 and record["first_ratio"] == 1.0 for record in records)
    assert records[0]["ratio"] != 1.0 and records[0]["kl"] == 0.0


def test_beta_changes_the_kl_penalty_and_never_the_whitened_score(world):
    found = []
    for beta in (0.0, 0.5, 1.0):
        run = open_run(ppo_config(world, "beta", beta=beta, gae_lambda=1.0))
        for part in run.models.reference.stages.values():
            for _, view in views(part):
                view.mul_(1.01)  # now the reference is somebody else
        answered = run.ppo._sample(1)
        experience = run.ppo._experience(answered, run.ppo._score(answered))
        # With lambda = 1 and discount 1 a row's first return is its score less beta times its KL.
        micros = [micro for group in experience.micros for micro in group]
        returns = torch.stack([micro.returns[lo] for micro in micros for lo in micro.bounds[:-1]])
        kl = torch.tensor([k for micro in micros for k in kl_of_rows(micro)])
        assert float(kl.abs().min()) > 0
        found.append((returns + beta * kl, whiten(experience.scores.combined)[[n for m in micros for n in m.rows]]))
    for whitened, expected in found:
        assert torch.allclose(whitened, expected, atol=1e-9) and torch.equal(expected, found[0][1])


def test_it_goes_on_bitwise_after_a_stop(world):
    whole = go(0, 1, ppo_config(world, "whole"))
    config = ppo_config(world, "halves")
    go(0, 1, replace(config, train=replace(config.train, stop_after=2)))
    assert differences(whole, go(0, 1, config)) == 0.0
    for name in ("checkpoints/step_00000004",):
        a, b = (Path(c.output_dir) / name for c in (ppo_config(world, "whole"), config))
        assert weights(a) == weights(b)


def test_it_goes_on_in_another_layout(world):
    whole = go(0, 1, ppo_config(world, "from-one"))
    config = ppo_config(world, "to-two")
    go(0, 1, replace(config, train=replace(config.train, stop_after=2)))
    with Ranks(2) as ranks:
        found = ranks.run(go, replace(config, parallel=replace(config.parallel, pp=2)))[0]
    assert differences(whole, found) < 1e-6


def moving(rank: int, size: int, config: Config) -> list[dict]:
    """The run with idle models that leave the device, which here is the host too."""
    usual = models.Residence
    models.Residence = partial(Residence, moves=True)
    try:
        return go(rank, size, config)
    finally:
        models.Residence = usual


def test_models_that_leave_the_device_learn_the_same(world):
    """Two replicas, with a stop and another start in between."""
    stays, moves = ppo_config(world, "stays", (1, 1, 2)), ppo_config(world, "moves", (1, 1, 2))
    with Ranks(2) as ranks:
        expected = ranks.run(go, stays)[0]
        ranks.run(moving, replace(moves, train=replace(moves.train, stop_after=2)))
        assert differences(expected, ranks.run(moving, moves)[0]) == 0.0
    last = "checkpoints/step_00000004"
    assert weights(Path(stays.output_dir) / last) == weights(Path(moves.output_dir) / last)


def command(config: Config, path: Path) -> list[str]:
    path.write_text(dump(config))
    return [sys.executable, "-m", "megallama", "ppo", "--config", str(path)]


def test_killed_in_the_middle_of_an_iteration_it_goes_on_as_if_nothing_had_been(world, tmp_path):
    """A real process, killed for real, several times, wherever it then is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = ppo_config(world, "undisturbed"), ppo_config(world, "killed")
    expected = go(0, 1, whole)
    line = command(killed, tmp_path / "killed.yaml")
    for iterations in (1, 2):
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder, patience = Path(killed.output_dir) / "checkpoints", time.monotonic() + 100
        while len(checkpoint_folders(folder)) < iterations and time.monotonic() < patience and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(line, env=environment, capture_output=True, text=True, timeout=200).returncode == 0
    assert differences(expected, read_metrics(killed.output_dir)) == 0.0
    last = "checkpoints/step_00000004"
    assert weights(Path(whole.output_dir) / last) == weights(Path(killed.output_dir) / last)


def test_a_run_keeps_its_models(world):
    """A reference or a judge that changes on the way would change what is learnt, in silence."""
    config = ppo_config(world, "models")
    go(0, 1, replace(config, train=replace(config.train, stop_after=1)))
    other = replace(config, judges=replace(config.judges, helpfulness=str(world.judges[1])))
    with pytest.raises(ValueError, match=r"judges\.helpfulness was .*helpful.* when this run began, and is now .*safe"):
        go(0, 1, other)
    start = replace(config, checkpoint=replace(config.checkpoint, load=f"weights:{config.output_dir}"))
    with pytest.raises(ValueError, match="the policy at the start was"):
        go(0, 1, start)


def test_whoever_asks_to_stop_waits_for_no_validation(world):
    config = ppo_config(world, "stop")
    run = open_run(config)
    with run_folder(config, run.mesh):
        asked: list[bool] = []
        iterate = run.ppo.iterate

        def signalled(iteration, stop):
            asked.append(stop())
            os.kill(os.getpid(), signal.SIGUSR1)  # comes while answers are sampled
            return iterate(iteration, stop)

        run.ppo.iterate = signalled
        run.run()
    records = read_metrics(config.output_dir)
    assert asked == [False] and [record["step"] for record in records] == [0, 1] and "valid_reward" not in records[1]
    assert checkpoint_folders(Path(config.output_dir) / "checkpoints")[0].name == "step_00000001"


def test_the_best_actor_is_exported(world):
    config = ppo_config(world, "export")
    target = Path(config.output_dir) / "hf"
    go(0, 1, replace(config, checkpoint=replace(config.checkpoint, export_hf=str(target))))
    best = checkpoint_folders(Path(config.output_dir) / "best")[0]
    assert open_weights(str(target)).model == replace(open_weights(str(best)).model, preset=None)


def test_the_best_actor_is_kept_and_patience_ends_the_run(world):
    config = ppo_config(world, "patience", patience=1)
    config = replace(
        config, train=replace(config.train, steps=20, valid_interval=1), optim=replace(config.optim, lr=0.1)
    )
    records = go(0, 1, config)
    assert records[0]["step"] == 0 and len(records) < 20
    rewards = {record["step"]: record["valid_reward"] for record in records}
    (best,) = checkpoint_folders(Path(config.output_dir) / "best")
    step = int(best.name[5:])
    assert rewards[step] == max(rewards.values())
    assert open_weights(str(Path(config.output_dir) / "best")).model.head == "lm"
    samples = sorted((Path(config.output_dir) / "samples").iterdir())
    assert samples[0].name == "step_00000000.jsonl" and len(samples) == len(records)


def broken_judge(world: World, target: Path) -> Path:
    from alignment_world import MODEL, RandomSource

    from megallama.checkpoint.formats.native import write_store
    from megallama.config import SCALAR

    class Broken(RandomSource):
        def read(self, name, rect, out):
            super().read(name, rect, out)
            if name == "score.weight":
                out.fill_(float("nan"))

    write_store(Broken(replace(MODEL, head=SCALAR)), target)
    return target


def test_a_reward_that_is_no_number_stops_all_before_any_weight_moves(world, tmp_path):
    config = ppo_config(world, "nan")
    config = replace(config, judges=JudgesConfig(str(broken_judge(world, tmp_path / "nan"))))
    config = replace(config, ppo=replace(config.ppo, valid_prompts=None))
    run = open_run(config)
    before = fingerprint(run.models.actor), fingerprint(run.models.critic)
    with pytest.raises(ValueError, match="helpfulness scores are not finite"):
        run.ppo.iterate(1)
    assert (fingerprint(run.models.actor), fingerprint(run.models.critic)) == before
    line = command(config, tmp_path / "nan.yaml")
    told = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert told.returncode == 1 and "not finite" in told.stderr and len(told.stderr.strip().splitlines()) == 1
    assert not checkpoint_folders(Path(config.output_dir) / "checkpoints")


REFUSED = {
    "no judge": ({"judges": JudgesConfig()}, "judges.helpfulness is empty"),
    "a judge without a score": (
        {"judges": JudgesConfig(helpfulness="POLICY")},
        "is a language model, not a reward model",
    ),
    "no start": ({"load": "auto"}, "checkpoint.load"),
    "rollouts": ({"rollouts": 12}, "ppo.rollouts=12 is not a multiple"),
    "no prompts": ({"prompts": None}, "ppo.prompts is empty"),
    "a long prompt": ({"prompts": "LONG"}, r"long\.jsonl:2: the prompt has \d+ tokens.*data\.seq_length=64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused(world, tmp_path, case, capfd):
    from megallama.cli import main

    change, message = REFUSED[case]
    write_records(tmp_path / "long.jsonl", [{"prompt": "Say red."}, {"prompt": "Say " + "red " * 70}])
    names = {"POLICY": str(world.policy), "LONG": str(tmp_path / "long.jsonl")}
    config = ppo_config(world, "refused")
    if "judges" in change:
        judges = change["judges"]
        config = replace(config, judges=replace(judges, helpfulness=names.get(judges.helpfulness, judges.helpfulness)))
    elif "load" in change:
        config = replace(config, checkpoint=replace(config.checkpoint, load=change["load"]))
    else:
        section = {key: names.get(value, value) for key, value in change.items()}
        config = replace(config, ppo=replace(config.ppo, **section))
    (tmp_path / "run.yaml").write_text(dump(config))
    try:
        code = main(["ppo", "--config", str(tmp_path / "run.yaml")])
    except SystemExit as stop:  # found once the ranks had met
        code = stop.code
    assert code in (1, 2)
    error = capfd.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
    shutil.rmtree(config.output_dir, ignore_errors=True)


def two_ranks(line: list[str]) -> list[subprocess.Popen]:
    """The command on two ranks, as torchrun would start them, so that one of them can be killed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            line,
            env={**os.environ, **common, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_rank_that_dies_ends_all_and_nothing_is_lost(world, tmp_path):
    whole, broken = ppo_config(world, "two", (1, 1, 2)), ppo_config(world, "broken", (1, 1, 2))
    with Ranks(2) as ranks:
        expected = ranks.run(go, whole)[0]
    line = command(broken, tmp_path / "broken.yaml")
    first, second = two_ranks(line)
    folder, patience = Path(broken.output_dir) / "checkpoints", time.monotonic() + 100
    while not checkpoint_folders(folder) and time.monotonic() < patience and first.poll() is None:
        time.sleep(0.005)
    second.send_signal(signal.SIGKILL)
    _, error = first.communicate(timeout=60)
    assert first.returncode != 0 and "megallama: error" in error, error
    second.communicate()
    finished = two_ranks(line)
    told = [process.communicate(timeout=200) for process in finished]
    assert [process.returncode for process in finished] == [0, 0], told
    assert "resumed from" in told[0][0]
    assert differences(expected, read_metrics(broken.output_dir)) == 0.0
