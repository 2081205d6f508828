"""A tiny world for the stages after pretraining: a tokenizer, a model, dialogues, pairs and prompts that can be learnt.

Answers repeat the word that the prompt asks for, so there is something to learn; lengths differ, some dialogues have
two turns. All of it is made anew in a folder of the test.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megallama.checkpoint.formats.native import write_store
from megallama.config import (
    SCALAR,
    ChatConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from megallama.model.initial import RandomWeights
from megallama.parallel.pieces import Rect
from megallama.runtime.mesh import build_mesh
from megallama.runtime.metrics import read_metrics
from megallama.train.run import run_folder, train

WORDS = ("red", "green", "blue", "grey", "pink", "gold", "teal", "plum")
MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=96,
    initializer_range=0.12,
)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2)]
"""(tp, pp, dp) in which every stage must see the same numbers."""


class RandomSource:
    """Random canonical weights as a source to write or load."""

    def __init__(self, model: ModelConfig, seed: int = 5):
        weights = RandomWeights(model, seed)
        self.folder, self.model, self.shapes = Path("random"), model, weights.shapes
        self.dtypes = dict.fromkeys(weights.shapes, torch.float32)
        self._read = weights.read

    def read(self, name: str, rect: Rect, out: torch.Tensor) -> None:
        self._read(name, rect, out)


class World(NamedTuple):
    """Where everything lies."""

    root: Path
    tokenizer: Path
    policy: Path
    judges: tuple[Path, Path]
    dialogues: Path
    pairs: Path
    prompts: Path


def make_world(root: Path, model: ModelConfig = MODEL) -> World:
    import sentencepiece

    out = io.BytesIO()
    text = [f"Say the word {a} and {b} now. [INST] Yes, {a} it is. [/INST]" for a in WORDS for b in WORDS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, vocab_size=model.vocab_size, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1, user_defined_symbols=["<ans>"],
    )  # fmt: skip
    world = World(
        root, root / "small.model", root / "policy", (root / "helpful", root / "safe"),
        root / "dialogues.jsonl", root / "pairs.jsonl", root / "prompts.jsonl",
    )  # fmt: skip
    world.tokenizer.write_bytes(out.getvalue())
    write_store(RandomSource(model), world.policy)
    for seed, folder in enumerate(world.judges):
        write_store(RandomSource(replace(model, head=SCALAR), seed + 11), folder)
    draw = random.Random(3)
    write_records(world.dialogues, [dialogue(draw) for _ in range(48)])
    write_records(world.pairs, [pair(draw) for _ in range(40)])
    write_records(world.prompts, [prompt(draw, n) for n in range(24)])
    return world


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def dialogue(draw: random.Random) -> dict[str, Any]:
    messages = []
    for _ in range(draw.choice((1, 1, 2))):
        word = draw.choice(WORDS)
        messages.append({"role": "user", "content": f"Say the word {word}{draw.choice(('', ' now'))}."})
        messages.append({"role": "assistant", "content": " ".join([word] * draw.randint(1, 4)) + "."})
    return {"messages": messages}


def pair(draw: random.Random) -> dict[str, Any]:
    word, other = draw.sample(WORDS, 2)
    record: dict[str, Any] = {"prompt": f"Say the word {word}.", "chosen": f"{word}.", "rejected": f"{other} {other}."}
    record["rating"] = draw.choice(("significantly_better", "better", "slightly_better", "negligibly_better"))
    if draw.random() < 0.5:
        record |= {"chosen_is_safe": True, "rejected_is_safe": draw.random() < 0.5}
    return record


def prompt(draw: random.Random, n: int) -> dict[str, Any]:
    return {"id": f"p{n}", "prompt": f"Say the word {draw.choice(WORDS)}.", "is_safety": n % 3 == 0}


def config_of(world: World, name: str, layout: tuple[int, int, int] = (1, 1, 1), dtype: str = "float64") -> Config:
    """A run of 4 steps of 8 samples from the world's policy; tests replace what they need."""
    tp, pp, _ = layout
    return Config(
        model=MODEL,
        parallel=ParallelConfig(tp=tp, pp=pp),
        data=DataConfig(seq_length=64, tokenizer=str(world.tokenizer), mask_documents=True, split=0.2),
        train=TrainConfig(
            steps=4, micro_batch_size=2, global_batch_size=8, dtype=dtype, valid_interval=2, valid_steps=2, seed=7
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=1, eps=1e-5),
        checkpoint=CheckpointConfig(load=f"weights:{world.policy}", async_save=False, interval=2),
        chat=ChatConfig(separator=None),
        output_dir=str(world.root / f"{name}-tp{tp}-pp{pp}-dp{layout[2]}"),
    )


def train_on_rank(rank: int, world_size: int, config: Config, prepare: Callable, build: Callable) -> list[dict]:
    """A stage's run on the default process group; its metrics."""
    model, parallel = config.model, config.parallel
    mesh = build_mesh(parallel.tp, parallel.pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    config, task = prepare(config, mesh)
    with run_folder(config, mesh):
        train(build(config, mesh), task)
    return read_metrics(config.output_dir) if rank == 0 else []


TIMES = ("seconds", "tokens_per_second", "tflops", "mfu", "memory_bytes")


def differences(a: list[dict], b: list[dict]) -> float:
    """Largest difference of two runs' numbers, times and speeds left out; infinite if they tell different things."""
    assert len(a) == len(b) > 0
    worst = 0.0
    for mine, theirs in zip(a, b, strict=True):
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        for key, value in mine.items():
            if not any(part in key for part in TIMES):
                assert (value is None) == (theirs[key] is None), key
                worst = max(worst, abs(value - theirs[key]) if value is not None else 0.0)
    return worst
