"""What makes a configuration valid: rules over the sections, each with the words for the user who broke it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megallama.config import Config, GenerateConfig, ModelConfig, ParallelConfig

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
RECOMPUTE = ("none", "selective", "full")
DTYPES = ("bfloat16", "float32", "float64")
LR_SCHEDULES = ("cosine", "constant")
HEADS = ("lm", "scalar")
MARGINS = ("none", "small", "large")
STARTS = ("eos", "bos", "none")

Check = tuple[bool, str]
"""Whether a rule holds, and what to say if it does not."""


def rules(config: Config, world: int) -> Iterator[Check]:
    """All rules in order; a rule may rely on those before it, since it is asked for only once they hold."""
    yield from _model_checks(config.model)
    yield from _layout_checks(config.model, config.parallel, world)
    yield from _batch_checks(config, config.data_parallel(world))
    yield from _value_checks(config)
    yield from _alignment_checks(config)
    yield from _generate_checks(config.generate)


def _model_checks(m: ModelConfig) -> Iterator[Check]:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    yield from (_at_least(f"model.{k}", getattr(m, k), 1) for k in (*sizes, "vocab_size", "max_position_embeddings"))
    heads, kv = m.num_attention_heads, m.num_key_value_heads
    yield (
        m.hidden_size % (2 * heads) == 0,
        f"model.hidden_size={m.hidden_size} cannot be split over model.num_attention_heads={heads} heads of even width "
        f"(rotary embedding turns pairs); choose a multiple of {2 * heads}",
    )
    yield (
        heads % kv == 0,
        f"model.num_attention_heads={heads} is not divisible by model.num_key_value_heads={kv}; "
        f"choose num_key_value_heads in {_divisors(heads)}",
    )
    yield _one_of("model.head", m.head, HEADS)
    for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
        yield getattr(m, key) > 0, f"model.{key}={getattr(m, key)} must be greater than 0"


def _layout_checks(m: ModelConfig, p: ParallelConfig, world: int) -> Iterator[Check]:
    yield from (_at_least(f"parallel.{k}", getattr(p, k), 1) for k in ("tp", "pp", "vpp"))
    heads, kv, layers = m.num_attention_heads, m.num_key_value_heads, m.num_hidden_layers
    usable = [t for t in range(1, heads + 1) if heads % t + m.intermediate_size % t == 0 and 0 in (kv % t, t % kv)]
    choose = f"choose tp in {', '.join(map(str, usable))}"
    yield heads % p.tp == 0, f"model.num_attention_heads={heads} is not divisible by parallel.tp={p.tp}; {choose}"
    yield (
        kv % p.tp == 0 or p.tp % kv == 0,
        f"model.num_key_value_heads={kv} can be neither split nor copied evenly over parallel.tp={p.tp}; {choose}",
    )
    width = m.intermediate_size
    yield width % p.tp == 0, f"model.intermediate_size={width} is not divisible by parallel.tp={p.tp}; {choose}"
    yield (
        world >= 1 and world % (p.tp * p.pp) == 0,
        f"{world} ranks cannot be laid out as parallel.tp={p.tp} x parallel.pp={p.pp}; "
        f"start a multiple of {p.tp * p.pp} ranks, or lower tp or pp",
    )
    yield _one_of("parallel.schedule", p.schedule, SCHEDULES)
    yield _one_of("parallel.recompute", p.recompute, RECOMPUTE)
    yield (
        p.vpp == 1 or p.schedule == "interleaved",
        f"parallel.vpp={p.vpp} needs parallel.schedule=interleaved, not {p.schedule}; set it, or vpp to 1",
    )
    yield (
        p.vpp == 1 or p.pp > 1,
        f"parallel.vpp={p.vpp} needs parallel.pp > 1; raise pp, or set vpp to 1",
    )

    given, stages = p.layers_per_stage, p.stages
    text = f"parallel.layers_per_stage={list(given)}"
    where = f"pp x vpp = {p.pp} x {p.vpp} = {stages} stages"
    yield (
        bool(given) or layers >= stages,
        f"model.num_hidden_layers={layers} cannot fill {where}; lower parallel.pp or parallel.vpp",
    )
    if given:
        yield len(given) == stages, f"{text} has {len(given)} entries for {where}; give one entry a stage"
        yield (
            sum(given) == layers,
            f"{text} adds up to {sum(given)}, but model.num_hidden_layers={layers}; make them equal",
        )
        yield min(given) >= 0, f"{text} has a negative entry; every stage holds 0 layers or more"
        yield (
            all(given[1:-1]),
            f"{text} leaves an inner stage empty; only the first (embedding) and the last (head) may hold 0 layers",
        )


def _batch_checks(config: Config, dp: int) -> Iterator[Check]:
    t, p, d = config.train, config.parallel, config.data
    yield _at_least("train.micro_batch_size", t.micro_batch_size, 1)
    unit = t.micro_batch_size * dp
    product = f"train.micro_batch_size={t.micro_batch_size} x dp={dp}"
    if p.vpp > 1:
        unit *= p.pp
        product += f" x parallel.pp={p.pp} (interleaving takes micro-batches pp at a time)"
    sizes = {"train.global_batch_size": t.global_batch_size}
    if t.ramp is not None:
        sizes |= {"train.ramp.start": t.ramp.start, "train.ramp.increment": t.ramp.increment}
    for key, samples in sizes.items():
        yield (
            samples >= 1 and samples % unit == 0,
            f"{key}={samples} is not a multiple of {product} = {unit}; choose a multiple of {unit}, or another "
            "train.micro_batch_size",
        )
    if t.ramp is not None:
        yield _at_least("train.ramp.samples", t.ramp.samples, 1)
        span = t.global_batch_size - t.ramp.start
        yield (
            span >= 0 and span % t.ramp.increment == 0,
            f"train.ramp cannot rise from {t.ramp.start} to train.global_batch_size={t.global_batch_size} in steps of "
            f"{t.ramp.increment}; choose a start and an increment that lead there",
        )
    yield _at_least("data.seq_length", d.seq_length, 1)
    yield (
        d.seq_length <= config.model.max_position_embeddings,
        f"data.seq_length={d.seq_length} is longer than model.max_position_embeddings="
        f"{config.model.max_position_embeddings}; shorten the one or raise the other",
    )


def _value_checks(config: Config) -> Iterator[Check]:
    t, o, d, c, log = config.train, config.optim, config.data, config.checkpoint, config.log
    yield _one_of("train.dtype", t.dtype, DTYPES)
    yield _one_of("optim.schedule", o.schedule, LR_SCHEDULES)
    floors: list[tuple[str, float, int]] = [
        ("train.steps", t.steps, 0),
        ("train.stop_after", 1 if t.stop_after is None else t.stop_after, 1),
        ("train.seed", t.seed, 0),
        ("train.valid_interval", t.valid_interval, 0),
        ("train.valid_steps", t.valid_steps, 1),
        ("train.max_bad_steps", t.max_bad_steps, 1),
        ("optim.lr", o.lr, 0),
        ("optim.warmup_steps", o.warmup_steps, 0),
        ("optim.weight_decay", o.weight_decay, 0),
        ("optim.clip_grad", o.clip_grad, 0),
        ("checkpoint.interval", c.interval, 0),
        ("checkpoint.keep", c.keep, 0),
        ("log.interval", log.interval, 1),
    ]
    yield from (_at_least(*floor) for floor in floors)
    yield o.eps > 0, f"optim.eps={o.eps} must be greater than 0"
    for n, beta in enumerate(o.betas):
        yield 0 <= beta < 1, f"optim.betas={list(o.betas)}: entry {n} is {beta}, it must be in [0, 1)"
    yield 0 <= o.warmup_share <= 1, f"optim.warmup_share={o.warmup_share} must be in [0, 1]"
    yield 0 <= o.min_lr_ratio <= 1, f"optim.min_lr_ratio={o.min_lr_ratio} must be in [0, 1]"
    yield 0 <= d.split < 1, f"data.split={d.split} must be in [0, 1): the share held out for validation"
    for source in d.sources:
        yield source.weight > 0, f"data.sources: {source.prefix} has weight {source.weight}; weights are greater than 0"
    if log.peak_tflops is not None:
        yield log.peak_tflops > 0, f"log.peak_tflops={log.peak_tflops} must be greater than 0"
    if t.profile is not None:
        yield (
            0 <= t.profile.start < t.profile.stop,
            f"train.profile: start={t.profile.start} and stop={t.profile.stop} must satisfy 0 <= start < stop",
        )


def _alignment_checks(config: Config) -> Iterator[Check]:
    sft, reward, judges, rejection, ppo = config.sft, config.reward, config.judges, config.rejection, config.ppo
    yield _one_of("reward.margin", reward.margin, MARGINS)
    floors: list[tuple[str, float, int]] = [
        ("sft.epochs", sft.epochs, 1),
        ("reward.epochs", reward.epochs, 1),
        ("reward.safety_weight", reward.safety_weight, 0),
        ("rejection.samples", rejection.samples, 1),
        ("rejection.max_new_tokens", rejection.max_new_tokens, 1),
        ("rejection.part", rejection.part, 1),
        ("ppo.rollouts", ppo.rollouts, 1),
        ("ppo.max_new_tokens", ppo.max_new_tokens, 1),
        ("ppo.beta", ppo.beta, 0),
        ("ppo.value_clip", ppo.value_clip, 0),
        ("ppo.patience", ppo.patience, 0),
    ]
    yield from (_at_least(*floor) for floor in floors)
    for key, sources in (("sft.sources", sft.sources), ("reward.sources", reward.sources)):
        for source in sources:
            ok = source.share is None or 0 < source.share < 1
            yield ok, f"{key}: {source.path} has share {source.share}; a share lies between 0 and 1, null = all records"
    for temperature in rejection.temperatures:
        yield temperature > 0, f"rejection.temperatures has {temperature}; temperatures are greater than 0"
    yield (
        len(set(rejection.temperatures)) == len(rejection.temperatures) > 0,
        (f"rejection.temperatures={list(rejection.temperatures)} must name at least one, and each once"),
    )
    yield 0 < judges.threshold < 1, f"judges.threshold={judges.threshold} must be a probability, such as 0.15"
    yield ppo.temperature > 0, f"ppo.temperature={ppo.temperature} must be greater than 0"
    for name, value in (("clip", ppo.clip), ("discount", ppo.discount), ("gae_lambda", ppo.gae_lambda)):
        yield 0 <= value <= 1, f"ppo.{name}={value} must be in [0, 1]"


def _generate_checks(g: GenerateConfig) -> Iterator[Check]:
    yield _one_of("generate.start", g.start, STARTS)
    floors: list[tuple[str, float, int]] = [
        ("generate.tp", 1 if g.tp is None else g.tp, 1),
        ("generate.rows", g.rows, 1),
        ("generate.max_new_tokens", g.max_new_tokens, 1),
        ("generate.temperature", g.temperature, 0),
        ("generate.top_k", g.top_k, 0),
        ("generate.seed", g.seed, 0),
    ]
    yield from (_at_least(*floor) for floor in floors)
    yield g.temperature < math.inf, f"generate.temperature={g.temperature} must be a number"
    yield 0 < g.top_p <= 1, f"generate.top_p={g.top_p} must be greater than 0 and at most 1 (1 = all tokens)"
    yield "" not in g.stop, "generate.stop has an empty text, which every answer holds; remove it"


def _at_least(key: str, value: float, floor: int) -> Check:
    return value >= floor, f"{key}={value} must be at least {floor}"


def _one_of(key: str, value: str, names: Sequence[str]) -> Check:
    return value in names, f"unknown {key} {value}; choose one of {', '.join(names)}"


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
