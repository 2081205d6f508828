"""Loading, dumping and checking a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallama import checks, options
from megallama.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RampConfig,
    SourceConfig,
    TrainConfig,
    dump,
    load,
)
from megallama.pipeline import SCHEDULES

YAML = """
model: {preset: llama2-70b, num_hidden_layers: 4}
parallel: {tp: 2, layers_per_stage: [4]}
data:
  sources:
    - {prefix: a, weight: 2}
    - prefix: b
optim:
  lr: 1e-4
  betas: [9e-1, 0.99]
train:
  ramp: {start: 8, increment: 8, samples: 1000}
log:
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return str(path)


def test_a_file_is_typed_and_presets_give_way_to_keys(file: str) -> None:
    config = load(["--config", file])
    assert (config.model.num_hidden_layers, config.model.hidden_size, config.model.num_key_value_heads) == (4, 8192, 8)
    assert config.parallel == ParallelConfig(tp=2, layers_per_stage=(4,))
    assert config.data.sources == (SourceConfig("a", 2.0), SourceConfig("b", 1.0))
    assert config.optim == OptimConfig(lr=1e-4, betas=(0.9, 0.99))
    assert config.train.ramp == RampConfig(8, 8, 1000)
    assert config.log == Config().log


def test_the_command_line_wins_wherever_it_stands(file: str) -> None:
    argv = ["--optim.lr=5e-5", "--config", file, "--model.preset", "llama2-7b", "--train.ramp.start", "16"]
    config = load([*argv, "--data.sources", "[{prefix: c}]", "--parallel.layers_per_stage", "[2, 2]"])
    assert config.optim.lr == 5e-5
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (4096, 4)
    assert config.train.ramp == RampConfig(16, 8, 1000)
    assert config.data.sources == (SourceConfig("c"),)
    assert config.parallel.layers_per_stage == (2, 2)


def test_a_null_on_the_command_line_empties_an_optional_section(file: str) -> None:
    assert load(["--config", file, "--train.ramp", "null"]).train.ramp is None


def test_nothing_given_is_the_defaults() -> None:
    assert load([]) == Config()


def test_a_stage_has_the_papers_recipe_below_what_is_given(tmp_path: Path) -> None:
    assert load([], "sft").optim.lr == 2e-5 and load([], "sft").data.mask_documents
    reward = load(["--optim.lr", "5e-6"], "reward")
    assert (reward.optim.lr, reward.optim.warmup_steps, reward.optim.warmup_share) == (5e-6, 5, 0.03)
    assert (reward.train.global_batch_size, load([], "ppo").optim.schedule) == (512, "constant")
    (tmp_path / "run.yaml").write_text("optim: {lr: 1.0e-3}\ngenerate: {prompts: [Hé, 😀]}\n")
    config = load(["--config", str(tmp_path / "run.yaml")], "sft")
    assert config.optim.lr == 1e-3 and config.optim.warmup_steps == 0
    assert config.generate.prompts == ("Hé", "😀")


CONFIGS = st.builds(
    Config,
    model=st.builds(ModelConfig, preset=st.sampled_from([None, "llama2-7b"]), rms_norm_eps=st.floats(1e-12, 1)),
    parallel=st.builds(ParallelConfig, layers_per_stage=st.lists(st.integers(0, 9)).map(tuple)),
    data=st.builds(
        DataConfig,
        sources=st.lists(st.builds(SourceConfig, st.text("a/b_1.- ", min_size=1), st.floats(0.001, 1e9))).map(tuple),
        tokenizer=st.sampled_from([None, "x.model"]),
    ),
    train=st.builds(
        TrainConfig,
        ramp=st.none() | st.builds(RampConfig, st.integers(1), st.integers(1), st.integers(1)),
        profile=st.none() | st.builds(ProfileConfig, st.integers(0), st.integers(1)),
        stop_after=st.none() | st.integers(1),
    ),
    optim=st.builds(OptimConfig, lr=st.floats(0, 1), betas=st.tuples(st.floats(0, 1), st.floats(0, 1))),
    output_dir=st.sampled_from(["runs/x", "123", "null", "true", "1e3", "a: b", "[x]", "-", "~"]),
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_a_dump_loads_back_equal(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("model.num_layers", "model.num_hidden_layers"),
        ("parallel.tensor_parallel_size", "parallel.tp"),
        ("parallel.pipeline_parallel_size", "parallel.pp"),
        ("train.micro_batch", "train.micro_batch_size"),
        ("train.ramp.begin", "train.ramp."),
        ("output", "output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str, tmp_path: Path) -> None:
    expected = f"unknown key {key}; did you mean {nearest}"
    for argv in (["--" + key, "1"], [f"--{key}=1"]):
        with pytest.raises(ValueError) as caught:
            load(argv)
        assert expected in str(caught.value)
    path = tmp_path / "bad.yaml"
    path.write_text("".join(f"{'  ' * n}{part}:\n" for n, part in enumerate(key.split("."))).rstrip("\n") + " 1\n")
    with pytest.raises(ValueError) as caught:
        load(["--config", str(path)])
    assert f"{path}: {expected}" in str(caught.value)


def test_an_unknown_section_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key modle\.hidden_size; did you mean model\.hidden_size\?"):
        load(["--modle.hidden_size", "64"])
    path = tmp_path / "bad.yaml"
    path.write_text("modle: {hidden_size: 64}")
    with pytest.raises(ValueError, match=r"unknown key modle; did you mean model\?"):
        load(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lr", "abc"], ["optim.lr", "float", "abc"]),
        (["--optim.lr"], ["optim.lr"]),
        (["--train.steps", "1.5"], ["train.steps", "int", "1.5"]),
        (["--optim.betas", "[0.9]"], ["optim.betas", "2 elements"]),
        (["--optim", "3"], ["optim is a section", "--optim.lr"]),
        (["--train.ramp", "{start: 1}"], ["train.ramp", "increment, samples"]),
        (["--data.sources", "[{weight: 1}]"], ["data.sources", "prefix"]),
        (["--data.sources", "[{prefix: a, wieght: 1}]"], ["data.sources.wieght", "data.sources.weight"]),
        (["--data.sources", "[corpus]"], ["data.sources", "mapping"]),
        (["--model.preset", "llama3"], ["llama3", "llama2-7b, llama2-13b"]),
        (["--config", "/no/such/file.yaml"], ["/no/such/file.yaml", "No such file"]),
        (["--config"], ["--config needs"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_input_is_one_clear_line(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["- 1", "{", "optim: 3", "config: x", "optim: {lr: null}", "\tx"])
def test_bad_files_are_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load(["--config", str(path)])
    assert "\n" not in str(caught.value)


SMALL = [
    *("--model.hidden_size", "64", "--model.intermediate_size", "96", "--model.num_hidden_layers", "8"),
    *("--model.num_attention_heads", "8", "--model.num_key_value_heads", "2", "--train.global_batch_size", "16"),
]


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (3, "--parallel.tp 3", ["num_attention_heads=8", "parallel.tp=3", "choose tp in 1, 2, 4, 8"]),
        (8, "--model.num_attention_heads 12 --model.hidden_size 72 --model.num_key_value_heads 3 --parallel.tp 2",
         ["num_key_value_heads=3", "parallel.tp=2", "choose tp in 1, 3, 6, 12"]),
        (8, "--model.intermediate_size 100 --parallel.tp 8", ["intermediate_size=100", "parallel.tp=8"]),
        (1, "--model.hidden_size 65", ["hidden_size=65", "num_attention_heads=8"]),
        (1, "--model.hidden_size 72", ["even width"]),
        (1, "--model.num_key_value_heads 3", ["num_key_value_heads=3", "choose num_key_value_heads in 1, 2, 4, 8"]),
        (6, "--parallel.tp 2 --parallel.pp 2", ["6 ranks", "parallel.tp=2 x parallel.pp=2", "multiple of 4"]),
        (16, "--parallel.pp 16 --train.global_batch_size 1", ["num_hidden_layers=8", "16 stages"]),
        (2, "--parallel.pp 2 --parallel.layers_per_stage [4,4,0]", ["3 entries", "2 stages"]),
        (2, "--parallel.pp 2 --parallel.layers_per_stage [4,5]", ["adds up to 9", "num_hidden_layers=8"]),
        (2, "--parallel.pp 2 --parallel.layers_per_stage [9,-1]", ["negative"]),
        (4, "--parallel.pp 4 --parallel.layers_per_stage [4,0,4,0]", ["inner stage empty"]),
        (2, "--parallel.pp 2 --parallel.vpp 2", ["parallel.vpp=2", "interleaved"]),
        (1, "--parallel.vpp 2 --parallel.schedule interleaved", ["parallel.pp > 1"]),
        (4, "--parallel.pp 4 --parallel.vpp 2 --parallel.schedule interleaved --train.global_batch_size 6",
         ["train.global_batch_size=6", "multiple of 4"]),
        (1, "--parallel.schedule 2f2b", ["2f2b", "gpipe, 1f1b, interleaved, zero-bubble"]),
        (1, "--parallel.recompute some", ["some", "none, selective, full"]),
        (4, "--train.micro_batch_size 3", ["train.global_batch_size=16", "train.micro_batch_size=3 x dp=4", "12"]),
        (1, "--train.ramp.start 3 --train.ramp.increment 4 --train.ramp.samples 9", ["cannot rise from 3", "16"]),
        (2, "--train.ramp.start 3 --train.ramp.increment 4 --train.ramp.samples 9", ["train.ramp.start=3"]),
        (1, "--train.ramp.start 32 --train.ramp.increment 4 --train.ramp.samples 9", ["from 32"]),
        (1, "--train.dtype float16", ["float16", "bfloat16, float32, float64"]),
        (1, "--data.seq_length 5000", ["data.seq_length=5000", "max_position_embeddings=4096"]),
        (1, "--data.split 1", ["data.split=1.0"]),
        (1, "--data.sources [{prefix:\\ a,\\ weight:\\ 0}]", ["a has weight 0"]),
        (1, "--optim.betas [0.9,1]", ["optim.betas", "entry 1"]),
        (1, "--optim.lr .nan", ["optim.lr=nan"]),
        (1, "--optim.eps 0", ["optim.eps"]),
        (1, "--optim.min_lr_ratio 2", ["optim.min_lr_ratio=2"]),
        (1, "--optim.schedule linear", ["linear", "cosine, constant"]),
        (1, "--train.steps -1", ["train.steps=-1"]),
        (1, "--train.stop_after 0", ["train.stop_after=0"]),
        (1, "--train.profile.start 3 --train.profile.stop 3", ["train.profile"]),
        (1, "--checkpoint.keep -1", ["checkpoint.keep=-1"]),
        (1, "--log.peak_tflops 0", ["log.peak_tflops"]),
        (0, "", ["0 ranks"]),
    ],
)  # fmt: skip
def test_an_impossible_configuration_says_what_to_change(world: int, overrides: str, words: list[str]) -> None:
    arguments = [part.replace("\0", " ") for part in overrides.replace("\\ ", "\0").split()]
    config = load([*SMALL, *arguments])
    with pytest.raises(ValueError) as caught:
        config.validate(world)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ""),
        (8, "--parallel.tp 8"),  # more ranks than K/V heads: copies
        (16, "--train.global_batch_size 32"),
        (2, "--parallel.pp 2 --parallel.layers_per_stage [8,0]"),  # a stage of the head alone
        (8, "--parallel.pp 4 --parallel.vpp 2 --parallel.schedule interleaved"),
        (4, "--train.ramp.start 4 --train.ramp.increment 4 --train.ramp.samples 100"),
        (4, "--parallel.pp 4 --train.micro_batch_size 16"),  # fewer micro-batches than stages
    ],
)
def test_a_possible_configuration_passes(world: int, overrides: str) -> None:
    load([*SMALL, *overrides.split()]).validate(world)


def test_the_schedules_are_those_of_the_pipeline_room() -> None:
    assert set(checks.SCHEDULES) == set(SCHEDULES)


def test_every_key_has_its_help() -> None:
    assert [o.key for o in options.options(Config) if not o.help] == []


def test_micro_batches() -> None:
    config = load([*SMALL, "--parallel.tp", "2", "--train.micro_batch_size", "2"])
    assert (config.data_parallel(8), config.micro_batches(8), config.micro_batches(8, 8)) == (4, 2, 1)
