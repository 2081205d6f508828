"""A run made small enough to check on any machine, with what can go wrong in its layout kept, and data that shows it.

The settings cannot hide a bug: a high learning rate without a long warm-up, so that wrong gradients move the weights; a
text that can be learnt; rows of unequal length with unequal numbers of labels, one of them without any.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megallama.config import Config, DataConfig, ModelConfig
from megallama.data.batch import IGNORE, Batch
from megallama.plan.cost import stage_layers

HEAD_DIM, WIDTH = 8, 256
"""Width of a head; less where many heads would make the model wider than WIDTH."""
SEQ_LENGTH, VOCABULARY = 24, 96
LEARNING_RATE, EPS = 1e-3, 1e-5


def shrink(config: Config, world: int, steps: int, dtype: str) -> Config:
    """A small run in the layout of `config` on `world` ranks.

    Kept: tp, pp, vpp, schedule, recompute, compile, tied embeddings, document masks, decay, clipping; query heads per
    K/V head; copies of K/V heads on tp ranks; whether tp divides the vocabulary; which stages hold more blocks than
    others and which hold none; micro-batches a step up to twice the pipeline's ranks (at least four).
    """
    model, train, tp = config.model, config.train, config.parallel.tp
    layers = _few_layers(stage_layers(model, config.parallel, config.data.seq_length))
    kv = tp * min(2, model.num_key_value_heads // tp) if model.num_key_value_heads >= tp else model.num_key_value_heads
    heads = kv * (model.num_attention_heads // model.num_key_value_heads)
    hidden = heads * max(2, min(HEAD_DIM, model.head_dim, WIDTH // heads // 2 * 2))
    small = replace(
        model,
        hidden_size=hidden,
        intermediate_size=tp * max(1, round(hidden * model.intermediate_size / model.hidden_size / tp)),
        num_hidden_layers=sum(layers),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=min(model.vocab_size, -(-VOCABULARY // tp) * tp + model.vocab_size % tp),
        max_position_embeddings=SEQ_LENGTH,
        initializer_range=0.8 / math.sqrt(hidden),
    )
    micros = min(config.micro_batches(world), max(4, 2 * config.parallel.pp))
    micro_batch_size = min(2, train.micro_batch_size)
    return Config(
        model=small,
        parallel=replace(config.parallel, layers_per_stage=layers),
        data=DataConfig(seq_length=SEQ_LENGTH, mask_documents=config.data.mask_documents),
        train=replace(
            train,
            steps=steps,
            dtype=dtype,
            micro_batch_size=micro_batch_size,
            global_batch_size=micros * micro_batch_size * config.data_parallel(world),
            ramp=None,
        ),
        optim=replace(config.optim, lr=LEARNING_RATE, warmup_steps=1, eps=EPS),
    )


def _few_layers(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Small counts in the same order: (8, 8, 9, 7) -> (3, 3, 4, 2); a stage of several blocks keeps at least two."""
    sizes = sorted({count for count in layers if count})
    least = min(2, sizes[0])
    return tuple(least + sizes.index(count) if count else 0 for count in layers)


def one_process(config: Config) -> Config:
    """The same run for a single process, the plainest way."""
    parallel = replace(config.parallel, tp=1, pp=1, vpp=1, layers_per_stage=(), schedule="1f1b", recompute="none")
    return replace(config, parallel=parallel, train=replace(config.train, compile=False))


def replica_batches(config: Config, dp: int, step: int, multiple: int) -> list[list[Batch]]:
    """[replica][micro-batch] of one step's global batch; one process takes them one after another.

    Args:
        multiple: micro-batches are padded to a multiple of this many tokens: parallel.tp.
    """
    rows = learnable_rows(config.model, config.data.seq_length, config.train.global_batch_size, step)
    size = config.train.micro_batch_size

    def pack(part: list[tuple[Tensor, Tensor]]) -> Batch:
        starts = [[tokens.numel() // 3] for tokens, _ in part] if config.data.mask_documents else None
        return Batch.pack(part, multiple, starts)

    return [
        [pack(rows[replica::dp][at : at + size]) for at in range(0, len(rows) // dp, size)] for replica in range(dp)
    ]


def learnable_rows(model: ModelConfig, seq_length: int, samples: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of each sample of a step, the same on every rank.

    Four times out of five a token follows from the one before. Row n keeps about (1 - n / (samples - 1)) of its labels:
    the first all, the last none (a single row keeps all).
    """
    random = torch.Generator().manual_seed(1000 + step)
    rows = []
    for n in range(samples):
        length = max(3, seq_length - n % 5)
        tokens = torch.randint(model.vocab_size, (length + 1,), generator=random)
        follows = torch.rand(length, generator=random) < 0.8
        for t in range(length):
            if follows[t]:
                tokens[t + 1] = (3 * tokens[t] + 7) % model.vocab_size
        labels = tokens[1:].clone()
        labels[torch.rand(length, generator=random) < n / max(1, samples - 1)] = IGNORE
        rows.append((tokens[:-1], labels))
    return rows
