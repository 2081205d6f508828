"""The four shapes are the paper's, to the parameter, and the example files are its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config import Config, OptimConfig, load
from megallama.plan import describe, parameters
from megallama.presets import PRESETS

PAPER = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
}
EXAMPLES = Path(__file__).parent.parent / "examples"
PEAK_LR = {"llama2-7b": 3e-4, "llama2-13b": 3e-4, "llama2-34b": 1.5e-4, "llama2-70b": 1.5e-4}
"""Table 1 of the paper."""


def example(name: str) -> Config:
    return load(["--config", str(EXAMPLES / name / "pretrain.yaml")])


@pytest.mark.parametrize("preset", PAPER)
def test_parameters_are_the_papers(preset: str) -> None:
    assert parameters(load(["--model.preset", preset]).model) == PAPER[preset]


def test_every_preset_is_covered() -> None:
    assert set(PRESETS) == set(PAPER) == set(PEAK_LR)


@pytest.mark.parametrize("preset", PAPER)
def test_example_is_the_papers_recipe(preset: str) -> None:
    config = example(preset.replace("-", "_"))
    assert config.model == load(["--model.preset", preset]).model
    assert config.optim == OptimConfig(
        lr=PEAK_LR[preset],
        min_lr_ratio=0.1,
        warmup_steps=2000,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
        clip_grad=1.0,
        schedule="cosine",
    )
    batch = config.train.global_batch_size * config.data.seq_length
    assert batch == 4 * 2**20
    assert abs(config.train.steps * batch - 2e12) <= batch / 2
    assert config.data.seq_length == config.model.max_position_embeddings == 4096
    for replicas in (1, 4, 16):
        world = config.parallel.tp * config.parallel.pp * replicas
        config.validate(world)
        assert f"{PAPER[preset]:,}" in describe(config, world)


@pytest.mark.parametrize("stage, rate", [("sft", 2e-5), ("reward", 1e-5), ("ppo", 1e-6)])
def test_chat_stages_of_70b_have_the_papers_recipe(stage: str, rate: float) -> None:
    path = EXAMPLES / "llama2_70b" / "chat.yaml"
    config = load(["--config", str(path), "--model.preset", "llama2-70b"], stage)
    config.validate(512)
    assert (config.optim.lr, config.ppo.beta, config.optim.betas) == (rate, 0.005, (0.9, 0.95))


def test_quickstart_is_a_small_gqa_llama_on_two_processes() -> None:
    config = example("quickstart")
    config.validate(2)
    assert 9e6 < parameters(config.model) < 11e6
    assert config.model.num_key_value_heads < config.model.num_attention_heads
    assert (config.parallel.tp, 150 <= config.train.steps <= 200) == (2, True)
