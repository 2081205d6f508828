"""Tokens per second of one training step, beside its bound and its peers, all in one run.

    python tools/benchmark/train_step.py                      # one process: bound, megallama, transformers
    python tools/benchmark/train_step.py --layouts            # dp 2, tp 2, pp 2 on two one-thread processes as well

The contestants of one process take turns, step by step, so that a machine that slows down slows all of them;
layouts run one after the other. Medians are compared.
`gemm` is the bound: every matrix product of the step at its own shape (attention in full), and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megallama.config import Config, DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megallama.data.batch import Batch
from megallama.runtime.launch import connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import NextToken, build_trainer

Step = Callable[[], object]

BENCH = ModelConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=512,
)
SEQUENCE = 512
LAYOUTS = {"dp 2": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2)}
"""Name -> (tp, pp) on two ranks."""


def rows(count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` random samples (tokens, labels)."""
    tokens = torch.randint(BENCH.vocab_size, (count, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    return [(row[:-1], row[1:]) for row in tokens]


def megallama_step(
    samples: int, micro: int, device: torch.device, tp: int = 1, pp: int = 1, compile: bool = False
) -> Step:
    """One optimizer step of this engine on the ranks of the default group, `samples` samples over all of them."""
    config = Config(
        model=BENCH,
        parallel=ParallelConfig(tp=tp, pp=pp),
        data=DataConfig(seq_length=SEQUENCE),
        train=TrainConfig(steps=10_000, micro_batch_size=micro, dtype="float32", compile=compile),
        optim=OptimConfig(warmup_steps=10),
    )
    mesh = build_mesh(tp, pp, BENCH.num_key_value_heads, tied=False, device=device)
    trainer = build_trainer(config, mesh)
    own = rows(samples)[mesh.dp.rank :: mesh.dp.size]
    micros = [Batch.pack(own[at : at + micro], tp) for at in range(0, len(own), micro)]
    loss = NextToken(BENCH.vocab_size, mesh.tp)
    return lambda: trainer.step(micros, loss)


def transformers_step(samples: int, compile: bool = False) -> Step:
    """The same step in transformers and torch.optim.AdamW (fused), with clipping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    names += ("vocab_size", "max_position_embeddings", "rms_norm_eps")
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(BENCH, name) for name in names}, use_cache=False))
    run = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )
    tokens = torch.stack([torch.cat((t, label[-1:])) for t, label in rows(samples)])

    def step() -> None:
        logits = run(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemm_step(samples: int) -> Step:
    """Forward, dX and dW of every linear, and attention's two products forward and four backward, nothing else."""
    m, tokens = BENCH, samples * SEQUENCE
    qkv = m.hidden_size + 2 * m.num_key_value_heads * m.head_dim
    block = [
        (m.hidden_size, qkv),
        (m.hidden_size, m.hidden_size),
        (m.hidden_size, 2 * m.intermediate_size),
        (m.intermediate_size, m.hidden_size),
    ]
    shapes = [*block * m.num_hidden_layers, (m.hidden_size, m.vocab_size)]
    data = {shape: (torch.randn(tokens, shape[0]), torch.randn(shape[1], shape[0])) for shape in set(shapes)}
    dy = {shape: torch.randn(tokens, shape[1]) for shape in set(shapes)}
    heads = samples * m.num_attention_heads
    q, scores = torch.randn(heads, SEQUENCE, m.head_dim), torch.randn(heads, SEQUENCE, SEQUENCE)

    def step() -> None:
        for shape in shapes:
            x, w = data[shape]
            x @ w.t()
            dy[shape] @ w
            dy[shape].t() @ x
        for _ in range(m.num_hidden_layers):
            for _ in range(2):  # forward q kᵀ and p v; backward dv, dp, dq, dk
                torch.bmm(q, q.transpose(1, 2))
                torch.bmm(scores, q)
                torch.bmm(scores.transpose(1, 2), q)

    return step


def medians(contestants: dict[str, Step], rounds: int, warmup: int) -> dict[str, float]:
    """Median seconds of each contestant; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def single(samples: int, rounds: int, warmup: int, compile: bool) -> None:
    """One process with all threads."""
    device = torch.device("cpu")
    contestants = {"gemm": gemm_step(samples), "megallama": megallama_step(samples, samples, device)}
    if compile:
        contestants["megallama compiled"] = megallama_step(samples, samples, device, compile=True)
    try:
        contestants["transformers"] = transformers_step(samples)
        if compile:
            contestants["transformers compiled"] = transformers_step(samples, compile=True)
    except ImportError:
        print("transformers is not installed (pip install 'megallama[hf]'): its rows are left out", file=sys.stderr)
    table(medians(contestants, rounds, warmup), samples, "gemm")


def layouts(samples: int, rounds: int, warmup: int) -> None:
    """Two one-thread processes against one process with two threads, one layout after the other."""
    seconds = {}
    for name, (tp, pp) in {"one process": (1, 1), **LAYOUTS}.items():
        ranks = 1 if name == "one process" else 2
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "seconds.json"
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", __file__]
            command += ["--worker", str(result), "--tp", str(tp), "--pp", str(pp), "--samples", str(samples)]
            command += ["--rounds", str(rounds), "--warmup", str(warmup)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(2 // ranks)})
            seconds[name] = json.loads(result.read_text())
    table(seconds, samples, "one process")


def worker(result: str, samples: int, rounds: int, warmup: int, tp: int, pp: int) -> None:
    """One rank of `layouts`."""
    world = resolve(os.environ)
    device = connect(world, rendezvous(world))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    own = samples // (world.size // (tp * pp))
    step = megallama_step(samples, 1 if pp > 1 else own, device, tp, pp)
    median = medians({"": step}, rounds, warmup)[""]
    if world.rank == 0:
        Path(result).write_text(json.dumps(median))
    disconnect()


def table(seconds: dict[str, float], samples: int, reference: str) -> None:
    """Print tokens/s and the ratio to `reference`."""
    print(f"\n{'':24}{'tokens/s':>10}{'s / step':>10}{'of ' + reference:>18}")
    for name, value in seconds.items():
        print(f"{name:24}{samples * SEQUENCE / value:10.0f}{value:10.2f}{seconds[reference] / value:18.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", action="store_true", help="also compare dp 2, tp 2 and pp 2 with one process")
    parser.add_argument("--compile", action="store_true", help="also run megallama and transformers compiled")
    parser.add_argument("--samples", type=int, default=4, help="sequences of 512 tokens a step [4; 8 with --layouts]")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tp", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--pp", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.samples, args.rounds, args.warmup, args.tp, args.pp)
        return
    shape = f"{BENCH.hidden_size} wide, {BENCH.num_hidden_layers} blocks, vocabulary {BENCH.vocab_size}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {shape}, sequences of {SEQUENCE}")
    single(args.samples, args.rounds, args.warmup, args.compile)
    if args.layouts:
        layouts(2 * args.samples, args.rounds, args.warmup)


if __name__ == "__main__":
    main()
