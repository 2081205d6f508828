"""A model of a few thousand weights in fp64, in any layout, and a tokenizer whose ids are letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megallama.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megallama.data.batch import Batch
from megallama.inference.sampling import Answer, Request, Sampling
from megallama.model import RandomWeights, canonical_shapes
from megallama.parallel.loss import log_probs
from megallama.parallel.pieces import Rect, views
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import Trainer, build_stages

EOS = 2
MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=51,  # odd: padded wherever tp is 2 or 4
    max_position_embeddings=40,
    initializer_range=0.4,
)

TALKER = replace(MODEL, vocab_size=301, max_position_embeddings=96)
"""For tests with a real tokenizer."""


class Letters:
    """Id n is the n-th letter of a long alphabet."""

    vocab_size, bos, eos = MODEL.vocab_size, 1, EOS

    def __init__(self, eos: int | None = EOS):
        self.eos = eos

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + i) for i in ids)

    def token_id(self, piece: str) -> int | None:
        return ord(piece) - ord("A") if len(piece) == 1 else None

    def fingerprint(self) -> str:
        return "letters"


class RandomSource:
    """The weights of `frozen` as a source."""

    folder = Path("random")

    def __init__(self, model: ModelConfig):
        self.model, self.shapes = model, canonical_shapes(model)
        self.dtypes = dict.fromkeys(self.shapes, torch.float64)

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        RandomWeights(self.model, seed=3).read(name, rect, out)


def frozen(
    tp: int = 1, pp: int = 1, model: ModelConfig = MODEL, dtype: str = "float64", layers: tuple[int, ...] = ()
) -> Trainer:
    """A model of random weights on the ranks of the default group, without an optimizer."""
    parallel = ParallelConfig(tp=tp, pp=pp, layers_per_stage=layers)
    config = Config(model=model, parallel=parallel, train=TrainConfig(dtype=dtype))
    mesh = build_mesh(tp, pp, model.num_key_value_heads, model.tied, torch.device("cpu"))
    stages = build_stages(config, mesh)
    for stage in stages.values():
        for piece, view in views(stage):
            RandomSource(model).read(piece.name, piece.rect, view)
    return Trainer(config, mesh, stages, None)


def requests(count: int, sampling: Sampling, model: ModelConfig = MODEL) -> list[Request]:
    """Prompts of 1 to 7 ids, some of them twice; answers of unequal longest lengths."""
    found = []
    for n in range(count):
        ids = torch.randint(3, model.vocab_size, (1 + n % 7,), generator=torch.Generator().manual_seed(n % 5))
        most = 1 + (sampling.max_new_tokens - 1 + 3 * n) % sampling.max_new_tokens
        found.append(Request(tuple(ids.tolist()), 100 + n, replace(sampling, max_new_tokens=most)))
    return found


def trainer_log_probs(trainer: Trainer, request: Request, answer: Answer) -> list[float]:
    """What the trainer's own forward pass and loss make of an answer; on one rank."""
    temperature = request.sampling.temperature or 1.0
    ids = torch.tensor(request.prompt + answer.ids)
    batch = Batch.pack([(ids[:-1], ids[1:])])

    def read(logits: Tensor, batch: Batch) -> Tensor:
        return log_probs(logits / temperature, batch.labels, trainer.config.model.vocab_size, trainer.mesh.tp)

    return trainer.infer([batch], read)[0][len(request.prompt) - 1 :].tolist()


def uncached(trainer: Trainer, request: Request, eos: int | None = EOS) -> list[int]:
    """Greedy ids, each from a full forward pass of its own; on one rank."""
    ids = list(request.prompt)
    longest = trainer.config.model.max_position_embeddings
    while len(ids) < min(len(request.prompt) + request.sampling.max_new_tokens, longest):
        tokens = torch.tensor(ids)
        (logits,) = trainer.infer([Batch.pack([(tokens, tokens)])], lambda logits, _: logits)
        ids.append(int(logits[-1, : trainer.config.model.vocab_size].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(request.prompt) :]
