"""Reward models: learnt alike in every layout, scored alike in every batch, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from alignment_world import (
    LAYOUTS,
    MODEL,
    RandomSource,
    World,
    config_of,
    differences,
    make_world,
    train_on_rank,
    write_records,
)

from distributed import Ranks
from megallama.alignment import RecordsConfig, RewardConfig
from megallama.config import SCALAR, Config, ParallelConfig
from megallama.data import read_dialogues, read_pairs
from megallama.data.rows import PairLoader, TokenPair, scored_rows
from megallama.model.canonical import SCORE
from megallama.parallel.pieces import views
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.runtime.metrics import read_metrics
from megallama.train import reward, sft
from megallama.train.models import frozen, open_weights, scored
from megallama.train.ranking import RankingLoss
from megallama.train.run import load_weights
from megallama.train.scoring import budgeted, last_values, scores
from megallama.train.sources import chat_format
from megallama.train.trainer import empty_trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("reward"))


def reward_config(world: World, name: str, layout: tuple[int, int, int] = (1, 1, 1), **section) -> Config:
    config = config_of(world, name, layout)
    section = {"sources": (RecordsConfig(str(world.pairs)),), "epochs": 2, "safety_weight": 0.5} | section
    return replace(
        config,
        model=replace(MODEL, head=SCALAR),
        train=replace(config.train, steps=0),
        reward=RewardConfig(**section),
    )


def test_every_layout_sees_the_same_run(world):
    runs = {}
    for layout in LAYOUTS:
        config = reward_config(world, "layouts", layout)
        with Ranks(layout[0] * layout[1] * layout[2]) as ranks:
            runs[layout] = ranks.run(train_on_rank, config, reward.reward_task, empty_trainer)[0]
    alone = runs.pop((1, 1, 1))
    assert {
        "reward_accuracy",
        "safety_loss",
        "valid_loss",
        "valid_accuracy_all",
        "valid_accuracy_slightly_better",
    } <= set(alone[-1])
    assert alone[-1]["loss"] < 0.8 * alone[0]["loss"] and alone[-1]["valid_accuracy_all"] > 0.6
    for layout, run in runs.items():
        assert differences(alone, run) < 1e-9, layout


def gradients(rank: int, size: int, config: Config) -> dict[str, list]:
    """Name -> [(rectangle, gradient)] of the first step; the first moment is a tenth of the gradient."""
    parallel, model = config.parallel, config.model
    mesh = build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    config, task = reward.reward_task(replace(config, optim=replace(config.optim, clip_grad=0.0)), mesh)
    trainer = empty_trainer(config, mesh)
    load_weights(trainer, config.checkpoint.load.removeprefix("weights:"))
    trainer.step(task.train.micros(0, mesh.dp.rank, mesh.dp.size, 2, 4 // mesh.dp.size), task.loss)
    found: dict[str, list] = {}
    for slot, states in trainer.optimizer.slots():
        if slot.owner:
            found.setdefault(slot.name, []).append((slot.rect, states["exp_avg"].clone()))
    return found


@pytest.mark.parametrize("layout", [(2, 1, 1), (4, 1, 1), (1, 2, 1)])
def test_gradients_of_head_and_trunk_equal_those_of_one_process(world, layout):
    """Copies of the head on tp ranks must not be counted tp times (a gather whose backward reduce-scatters would)."""
    model = replace(MODEL, head=SCALAR)
    whole = gradients(0, 1, reward_config(world, "gradients"))
    with Ranks(layout[0] * layout[1]) as ranks:
        parts = ranks.run(gradients, reward_config(world, "gradients", layout))
    assert SCORE in whole and model.head == SCALAR
    for name, ((_, expected),) in whole.items():
        seen = torch.zeros_like(expected)
        for part in parts:
            for where, values in part.get(name, []):
                seen[where.r0 : where.r1, where.c0 : where.c1] += values
        assert float(expected.abs().max()) > 1e-7, name
        assert torch.allclose(seen, expected, rtol=1e-9, atol=1e-13), name


def rows_of(count: int = 9) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 300, size=draw.integers(2, 20)) for _ in range(count)]


def scores_on_rank(rank: int, size: int, config: Config, rows: list[np.ndarray]) -> list[float]:
    parallel, model = config.parallel, config.model
    mesh = build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    return scores(frozen(config, mesh, RandomSource(model)), rows).tolist()


def test_scores_do_not_depend_on_batch_padding_or_layout(world):
    model, rows = replace(MODEL, head=SCALAR), rows_of()
    config = replace(config_of(world, "scores"), model=model)
    trainer = frozen(config, Mesh(), RandomSource(model))
    one_by_one = [float(trainer.infer([scored_rows([row])], last_values)[0]) for row in rows]
    assert scores(trainer, rows).tolist() == pytest.approx(one_by_one, abs=1e-12)
    assert scores(trainer, rows[::-1]).tolist() == pytest.approx(one_by_one[::-1], abs=1e-12)
    padded = trainer.infer([scored_rows(rows, multiple=64)], last_values)[0].tolist()
    assert padded == pytest.approx(one_by_one, abs=1e-12)
    for layout in [*LAYOUTS[1:], (1, 1, 2)]:
        plan = replace(config, parallel=ParallelConfig(tp=layout[0], pp=layout[1]))
        with Ranks(layout[0] * layout[1] * layout[2]) as ranks:
            for found in ranks.run(scores_on_rank, plan, rows):
                assert found == pytest.approx(one_by_one, abs=1e-12), layout


def test_the_score_is_read_at_the_last_token(world):
    model = replace(MODEL, head=SCALAR)
    trainer = frozen(replace(config_of(world, "last"), model=model), Mesh(), RandomSource(model))
    row = rows_of(1)[0]
    (values,) = trainer.infer([scored_rows([row, row[:-1]])], lambda output, batch: output[:, 0])
    assert scores(trainer, [row, row[:-1]]).tolist() == [float(values[len(row) - 1]), float(values[-1])]
    assert float(values[len(row) - 2]) == pytest.approx(float(values[-1]), abs=1e-12)  # causal


def test_a_new_head_stands_on_the_trunk_of_the_chat_model(world):
    source = scored(open_weights(str(world.policy)), seed=3)
    assert source.model.head == SCALAR and SCORE in source.shapes and "lm_head.weight" not in source.shapes
    trainer = frozen(config_of(world, "head"), Mesh(), source)
    trunk = {piece.name: view for piece, view in views(trainer.stages[0])}
    expected = torch.empty_like(trunk["model.layers.1.mlp.up_proj.weight"])
    original = RandomSource(MODEL)
    rect = next(p.rect for p, _ in views(trainer.stages[0]) if p.name == "model.layers.1.mlp.up_proj.weight")
    original.read("model.layers.1.mlp.up_proj.weight", rect, expected)
    assert torch.equal(trunk["model.layers.1.mlp.up_proj.weight"], expected)
    assert 0 < float(trunk[SCORE].std()) < 1
    judge = open_weights(str(world.judges[0]))
    assert scored(judge, seed=3) is judge


def test_margin_and_safety_reach_the_loss(world):
    pairs = [TokenPair(*rows_of(2), margin, (1.0, math.nan)) for margin in (0.0, 2.0)]
    losses = []
    for n in (0, 1):
        (batch,) = PairLoader(pairs, [n]).micros(0, 0, 1, 1, 1)
        values = torch.linspace(-1, 1, batch.length)[:, None]
        losses.append(float(RankingLoss()(values, batch)[0]))
    assert losses[1] > losses[0] + 0.5
    (batch,) = PairLoader(pairs, [0]).micros(0, 0, 1, 1, 1)
    assert batch.extras["safe"][0] == 1 and batch.extras["safe"][1].isnan() and batch.count == 1
    (empty,) = PairLoader(pairs, [0]).micros(5, 0, 1, 1, 1)
    loss, metrics = RankingLoss(0.5)(torch.zeros(empty.length, 1, requires_grad=True), empty)
    assert empty.count == 0 and loss.item() == 0 and all(m.item() == 0 for m in metrics.values())


def test_budgets_cut_rows_into_runs():
    assert list(budgeted(range(5), [3, 3, 9, 1, 1], 6)) == [[0, 1], [2], [3, 4]]
    assert list(budgeted([], [], 6)) == []


def test_truncation_that_makes_answers_equal_is_refused(world, tmp_path):
    record = {"prompt": "Say " + "red " * 70, "chosen": "red.", "rejected": "blue."}
    write_records(tmp_path / "long.jsonl", [record])
    config = reward_config(world, "long", sources=(RecordsConfig(str(tmp_path / "long.jsonl")),))
    with pytest.raises(ValueError, match=r"long\.jsonl:1.*equal within data\.seq_length=64"):
        reward.reward_task(config, Mesh())


def test_a_text_that_spells_a_special_token_is_named(world, tmp_path):
    """SentencePiece never reads one out of a text, other tokenizers do."""
    path = tmp_path / "tags.jsonl"
    write_records(path, [{"prompt": "Say red.", "chosen": "red.", "rejected": f"blue.{end}"} for end in ("", "<END>")])
    form = chat_format(reward_config(world, "tags"))
    encode_batch = form.tokenizer.encode_batch
    form.tokenizer.encode_batch = lambda texts: [
        ids + [form.eos] * ("<END>" in text) for text, ids in zip(texts, encode_batch(texts), strict=True)
    ]
    with pytest.raises(ValueError, match=r"tags\.jsonl:2: a text spells the tokenizer's special token"):
        reward.encode(form, read_pairs(str(path)), "none", 64)
    write_records(path, [{"prompt": "Say red.", "response": f"red.{end}"} for end in ("", "<END>")])
    with pytest.raises(ValueError, match=r"tags\.jsonl:2: a text spells the tokenizer's special token"):
        sft.encode(form, read_dialogues(str(path)), 64)


def test_it_resumes_bitwise_and_the_command_line_works(world, tmp_path, capfd):
    from megallama.cli import main

    line = [
        "reward", "--checkpoint.load", f"weights:{world.policy}", "--data.tokenizer", str(world.tokenizer),
        "--data.seq_length", "64", "--data.split", "0.2", "--reward.sources",
        json.dumps([{"path": str(world.pairs)}]), "--reward.epochs", "2", "--reward.margin", "large",
        "--train.dtype", "float32", "--train.global_batch_size", "8", "--train.valid_interval", "2",
        "--checkpoint.async_save", "false", "--optim.lr", "1e-3",
    ]  # fmt: skip
    assert main([*line, "--output_dir", str(tmp_path / "whole")]) == 0
    assert main([*line, "--output_dir", str(tmp_path / "half"), "--train.stop_after", "4"]) == 0
    assert main([*line, "--output_dir", str(tmp_path / "half")]) == 0
    whole, half = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "half")
    assert differences(whole, half) == 0.0
    assert whole[0]["lr"] == pytest.approx(1e-3 / 5)  # warm-up is at least five steps
    assert open_weights(str(tmp_path / "whole")).model.head == SCALAR
    again = ["sft", *line[1:], "--checkpoint.load", str(tmp_path / "whole" / "checkpoints" / "step_00000008")]
    assert main([*again, "--output_dir", str(tmp_path / "mixed")]) == 2
    assert "weights:" in capfd.readouterr().err


@pytest.mark.parametrize("stage, words", [
    ("sft", ["as many steps as the epochs have", "moments"]),
    ("reward", ["as many steps as the epochs have", "moments"]),
    ("ppo", ["400 iterations of 512 answers and 8 mini-batches of 64", "the actor"]),
    ("chat", ["GiB a rank, in float32"]),
    ("generate", ["GiB a rank, in float32"]),
    ("rejection-sample", ["GiB a rank, in float32"]),
    ("reward-eval", ["GiB a rank, in float32"]),
])  # fmt: skip
def test_a_dry_run_knows_the_weights_that_a_stage_opens(world, tmp_path, capfd, stage, words):
    from megallama.cli import main

    line = [
        stage, "--checkpoint.load", f"weights:{world.policy}", "--generate.model", str(world.policy),
        "--rejection.model", str(world.policy), "--reward.models", json.dumps([str(world.judges[0])]),
        "--train.dtype", "float32", "--output_dir", str(tmp_path / "run"), "--parallel.tp", "2", "--dry-run",
    ]  # fmt: skip
    assert main([*line, "--world", "4"]) == 0
    told = capfd.readouterr().out
    assert "hidden 32" in told and "4 = tp 2 x pp 1 x dp 2" in told and not (tmp_path / "run").exists()
    for word in words:
        assert word in told
    assert f"own shape, {'25,792' if 'reward' in stage else '36,000'} parameters" in told
    assert main([stage, "--dry-run", "--output_dir", str(tmp_path / "none")]) == 2


def test_models_and_test_sets_make_a_grid(world, tmp_path, capfd):
    from megallama.cli import main

    more = tmp_path / "more.jsonl"
    write_records(more, [{"prompt": "Say it.", "chosen": "red.", "rejected": "blue."}] * 3)
    models = [str(path) for path in world.judges]
    line = [
        "reward-eval", "--reward.models", json.dumps(models),
        "--reward.valid", json.dumps([str(world.pairs), str(more)]),
        "--data.tokenizer", str(world.tokenizer), "--data.seq_length", "64", "--train.dtype", "float32",
        "--output_dir", str(tmp_path / "grid"),
    ]  # fmt: skip
    assert main(line) == 0
    found = json.loads((tmp_path / "grid" / "reward_eval.json").read_text())
    assert list(found) == models and all(set(tests) == {str(world.pairs), str(more)} for tests in found.values())
    for model in models:
        tests = found[model]
        by_rating = tests[str(world.pairs)]["accuracy"]
        assert by_rating["all"]["pairs"] == 40 == sum(n["pairs"] for name, n in by_rating.items() if name != "all")
        assert tests[str(more)]["accuracy"]["unrated"]["accuracy"] in (0.0, 1.0)  # three times the same pair
        assert sum(row["n"] for row in tests[str(world.pairs)]["calibration"]) == 40
    assert (tmp_path / "grid" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "models x test sets" in capfd.readouterr().out
    assert main([*line, "--reward.models", json.dumps([str(world.policy)])]) == 2
    assert "is a language model" in capfd.readouterr().err
