"""What `--dry-run` prints."""

from __future__ import annotations

from megallama.config import Config
from megallama.pipeline import Action, bubble, build, simulate
from megallama.plan.cost import block_flops, head_flops, parameters, stage_layers, train_flops_per_token
from megallama.plan.memory import rank_memory

GIB = 2**30


TRAINING = ("pretrain", "verify", "sft", "reward", "ppo")
"""Stages that train; the others hold weights and no more."""


def describe(config: Config, world_size: int, stage: str = "pretrain") -> str:
    """Layout, parameters, work and bytes a rank of a valid configuration on `world_size` ranks."""
    m, p, t = config.model, config.parallel, config.train
    dp, seq = config.data_parallel(world_size), config.data.seq_length
    tokens = t.global_batch_size * seq
    flops = train_flops_per_token(m, seq) * tokens
    idle = simulated_bubble(config, world_size)
    most = "up to " if t.ramp else ""
    ramp = f", after a ramp from {t.ramp.start} over {t.ramp.samples:,} samples" if t.ramp else ""
    lines = [
        ("model", f"{m.preset or 'own shape'}, {parameters(m):,} parameters"),
        (
            "shape",
            f"{m.num_hidden_layers} layers, hidden {m.hidden_size}, feed-forward {m.intermediate_size}, "
            f"{m.num_attention_heads} heads / {m.num_key_value_heads} KV, vocabulary {m.vocab_size}",
        ),
        ("ranks", f"{world_size} = tp {p.tp} x pp {p.pp} x dp {dp}"),
        ("layers", _layers(config)),
    ]
    if stage not in TRAINING:
        heaviest = max(row.weights for row in rank_memory(config, world_size))
        lines.append(("weights", f"{heaviest / GIB:.3f} GiB a rank, in {t.dtype}; keys and values come on top"))
        return _table(lines)
    lines += [
        (
            "batch",
            f"{t.global_batch_size} samples x {seq} tokens = {tokens:,} tokens a step{ramp}; "
            f"{config.micro_batches(world_size)} micro-batches of {t.micro_batch_size} on each replica",
        ),
        ("schedule", f"{p.schedule}, recompute {p.recompute}, {t.dtype}; simulated bubble {100 * idle:.1f} %"),
        ("work", f"{flops / 1e12:,.2f} TFLOP a step (three forwards, attention counted in full)"),
        ("run", f"{_length(config, stage, tokens, most)}, peak learning rate {config.optim.lr:g}"),
    ]
    if t.steps and config.optim.warmup_steps >= t.steps:
        note = f"optim.warmup_steps={config.optim.warmup_steps} spans the run: the peak learning rate is never reached"
        lines.append(("note", note))
    if stage == "ppo":
        lines.append(
            ("note", "what follows is the actor; the critic is like it, reference and judges hold weights alone")
        )
    return "\n".join([_table(lines), "", *_memory_table(config, world_size)])


def _table(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<10}{text}" for name, text in lines)


def _length(config: Config, stage: str, tokens: int, most: str) -> str:
    """How long the run is."""
    steps = config.train.steps
    if stage == "ppo":
        rollouts, mini_batch = config.ppo.rollouts, config.train.global_batch_size
        return f"{steps:,} iterations of {rollouts} answers and {rollouts // mini_batch} mini-batches of {mini_batch}"
    if not steps:
        return "as many steps as the epochs have"
    return f"{steps:,} steps, {most}{steps * tokens:,} tokens"


def simulated_bubble(config: Config, world_size: int) -> float:
    """Share of the pipeline ranks' time spent waiting, from the step's own program timed by FLOPs; no communication."""
    m, p = config.model, config.parallel
    program = build(p.schedule, p.pp, config.micro_batches(world_size), p.vpp)
    split = any(action.kind == "W" for row in program for action in row)
    layers = stage_layers(m, p, config.data.seq_length)
    block = block_flops(m, config.data.seq_length)

    def cost(action: Action) -> float:
        blocks = layers[action.stage] * block
        forward = blocks + (head_flops(m) if action.stage == p.stages - 1 else 0)
        again = blocks if p.recompute == "full" else 0
        return {"F": forward, "B": forward * (1 if split else 2) + again, "W": forward}[action.kind]

    return bubble(simulate(program, cost), p.pp)


def _layers(config: Config) -> str:
    p = config.parallel
    layers = stage_layers(config.model, p, config.data.seq_length)
    if p.vpp == 1:
        return (
            f"{' + '.join(map(str, layers))} over the pipeline ranks" if p.pp > 1 else f"all {layers[0]} on every rank"
        )
    rounds = [" + ".join(map(str, layers[chunk * p.pp : (chunk + 1) * p.pp])) for chunk in range(p.vpp)]
    return f"{' | '.join(rounds)} over the pipeline ranks, {p.vpp} chunks each"


def _memory_table(config: Config, world_size: int) -> list[str]:
    rows = rank_memory(config, world_size)
    heads = [*rows[0]._fields, "total"]
    table = ["GiB a rank" + "".join(f"{head:>13}" for head in heads)]
    for rank, row in enumerate(rows):
        table.append(f"pp rank {rank:<2}" + "".join(f"{b / GIB:>13.3f}" for b in [*row, sum(row)]))
    return [
        *table,
        "Activations, logits and buffers at their common peak; what libraries and the allocator take comes on top.",
    ]
