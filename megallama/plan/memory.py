"""Bytes on one rank of each pipeline position: exact for weights and optimizer, an estimate for activations."""

from __future__ import annotations

from typing import NamedTuple

from megallama.config import SCALAR, Config
from megallama.pipeline import build, peak_activations
from megallama.plan.cost import block_parameters, head_parameters, stage_layers, vocabulary_parameters

WIDTH = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number of each train.dtype."""


class RankMemory(NamedTuple):
    """Bytes by part on one rank. Paddings, communication buffers and the allocator's slack are not in it."""

    weights: int
    gradients: int
    masters: int
    moments: int
    activations: int


def rank_memory(config: Config, world_size: int) -> tuple[RankMemory, ...]:
    """Bytes on a rank at each pipeline position (all its tp and dp ranks hold the same).

    Weights have the compute type; gradients accumulate in at least float32 over the whole stage; master weights (which
    are the weights themselves unless the compute type is bfloat16) and both moments are split over dp (ZeRO-1).
    """
    p, width = config.parallel, WIDTH[config.train.dtype]
    full = max(width, 4)
    dp = config.data_parallel(world_size)
    layers = stage_layers(config.model, p, config.data.seq_length)
    program = build(p.schedule, p.pp, config.micro_batches(world_size), p.vpp)
    peaks = peak_activations(program)

    def memory(rank: int) -> RankMemory:
        stages = range(rank, p.stages, p.pp)
        count = sum(stage_parameters(config, stage, layers[stage]) for stage in stages)
        shard = -(-count // dp)
        return RankMemory(
            weights=count * width,
            gradients=count * full,
            masters=shard * full if full > width else 0,
            moments=2 * shard * full,
            activations=round(peaks[rank] * max(layers[s] for s in stages) * kept_bytes(config))
            + (working_bytes(config) if p.recompute == "full" else 0)
            + (logits_bytes(config) if rank == p.pp - 1 else 0),
        )

    return tuple(memory(rank) for rank in range(p.pp))


def stage_parameters(config: Config, stage: int, layers: int) -> int:
    """Parameters of a stage with `layers` blocks on one tensor-parallel rank, copies of a tied embedding included."""
    model, tp, last = config.model, config.parallel.tp, config.parallel.stages - 1
    count = layers * block_parameters(model, tp)
    if stage == 0:
        count += vocabulary_parameters(model, tp)
    if stage == last:
        count += model.hidden_size + (0 if model.tied and stage == 0 else head_parameters(model, tp))
    return count


def kept_bytes(config: Config) -> int:
    """Estimated bytes that one block keeps from a micro-batch's forward for its backward, on one rank.

    Per token, numbers: both norms' input and output, the queries, the attention's output (6 * hidden), keys and values,
    and gate, up and their product (3 * intermediate), all split over tp as sequences are between the matrices; without
    recomputation of the attention core one float32 softmax statistic a head more. Full recomputation keeps the block's
    input alone.
    """
    recompute = config.parallel.recompute
    if recompute == "full":
        return _tokens(config) * config.model.hidden_size * WIDTH[config.train.dtype] // config.parallel.tp
    statistics = 4 * config.model.num_attention_heads if recompute == "none" else 0
    return working_bytes(config) + _tokens(config) * statistics // config.parallel.tp


def working_bytes(config: Config) -> int:
    """Estimated bytes of one block's activations while its backward runs, on one rank (see `kept_bytes`)."""
    model, tp = config.model, config.parallel.tp
    kv = 2 * max(model.num_key_value_heads, tp) * model.head_dim
    numbers = 6 * model.hidden_size + kv + 3 * model.intermediate_size
    return _tokens(config) * numbers * WIDTH[config.train.dtype] // tp


def logits_bytes(config: Config) -> int:
    """Estimated bytes of one micro-batch's logits on a rank of the last stage, in at least float32."""
    if config.model.head == SCALAR:
        return 0
    width = max(WIDTH[config.train.dtype], 4)
    return _tokens(config) * width * -(-config.model.vocab_size // config.parallel.tp)


def _tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.data.seq_length
