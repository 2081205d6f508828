"""Tokens per second of generation, beside its peer and the layout that it avoids, all in one run.

    python tools/benchmark/generate.py

The contestants take turns, round by round, so that a machine that slows down slows all of them; medians are compared.

consolidated    two processes of one thread that train in a pipeline gather the weights, answer as two replicas, and
                free them again; the gathering is in its time, and shown alone as well
pipeline        the same two processes and the same generator over the training layout: every token goes through both
one process     this process with two threads
transformers    `generate` with a static cache in this process; all prompts in one batch

Weights are random, prompts are of one length, nothing ends early: every contestant makes the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megallama.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megallama.inference.consolidate import Consolidation, generation_mesh
from megallama.inference.generator import Generator
from megallama.inference.sampling import Request, Sampling
from megallama.model import RandomWeights
from megallama.parallel.pieces import views
from megallama.runtime.launch import connect, disconnect, rendezvous, resolve
from megallama.runtime.mesh import build_mesh
from megallama.train.trainer import Trainer, build_stages

BENCH = ModelConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=1024,
)
THREADS = 2
Round = Callable[[], None]


class NoEnd:
    """A tokenizer without an end-of-text token: every answer has its full length. It reads and writes nothing."""

    vocab_size = BENCH.vocab_size
    bos: int | None = None
    eos: int | None = None

    def encode(self, text: str) -> list[int]:
        return []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def token_id(self, piece: str) -> int | None:
        return None

    def fingerprint(self) -> str:
        return ""


def prompts(args: argparse.Namespace) -> torch.Tensor:
    """(batch, prompt) random ids."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(BENCH.vocab_size, (args.batch, args.prompt), generator=random)


def requests(args: argparse.Namespace) -> list[Request]:
    sampling = Sampling(args.tokens, args.temperature)
    return [Request(tuple(ids), number, sampling) for number, ids in enumerate(prompts(args).tolist())]


def frozen(pp: int, device: torch.device) -> Trainer:
    """The benchmark's model on the ranks of the default group."""
    train = TrainConfig(dtype="float32", micro_batch_size=1, global_batch_size=2)
    data = DataConfig(seq_length=BENCH.max_position_embeddings)
    config = Config(model=BENCH, parallel=ParallelConfig(pp=pp), data=data, train=train)
    mesh = build_mesh(1, pp, BENCH.num_key_value_heads, False, device)
    stages = build_stages(config, mesh)
    source = RandomWeights(BENCH, seed=1)
    with torch.no_grad():
        for stage in stages.values():
            for piece, view in views(stage):
                source.read(piece.name, piece.rect, view)
    return Trainer(config, mesh, stages, None)


def one_process(args: argparse.Namespace) -> Round:
    generator, asked = Generator(frozen(1, torch.device("cpu")), NoEnd(), args.batch), requests(args)

    def answer() -> None:
        generator.run(asked)

    return answer


def transformers_round(args: argparse.Namespace) -> Round:
    """As many tokens from transformers, on weights of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["vocab_size", "max_position_embeddings", "rms_norm_eps"]
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(BENCH, name) for name in names})).eval()
    ids = prompts(args)
    settings: dict[str, Any] = {"do_sample": False}
    if args.temperature:
        settings = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}

    def answer() -> None:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=True,
            **settings,
        )
        assert made.shape[1] == args.prompt + args.tokens, "every contestant makes the same number of tokens"

    return answer


def timed(answer: Round) -> float:
    start = time.perf_counter()
    answer()
    return time.perf_counter() - start


def worker(args: argparse.Namespace) -> None:
    """One rank of the two processes: a round for each name that rank 0 reads from its standard input."""
    world = resolve(os.environ)
    device = connect(world, rendezvous(world))
    torch.set_num_threads(1)
    trainer, asked = frozen(2, device), requests(args)
    plan = Consolidation(trainer, generation_mesh(trainer.config, 1, trainer.mesh))
    gathered: list[float] = []

    def consolidated() -> None:
        start = time.perf_counter()
        with plan.gathered() as generating:
            gathered.append(time.perf_counter() - start)
            Generator(generating, NoEnd(), args.batch // 2).run(asked)

    def pipeline() -> None:
        Generator(trainer, NoEnd(), args.batch).run(asked)

    rounds = {"consolidated": consolidated, "pipeline": pipeline}
    while True:
        box = [sys.stdin.readline().strip() if world.rank == 0 else ""]
        dist.broadcast_object_list(box)
        if not box[0]:
            break
        dist.barrier()
        seconds = timed(rounds[box[0]])
        dist.barrier()
        if world.rank == 0:
            print(json.dumps([seconds, gathered[-1] if gathered else 0.0]), flush=True)
    disconnect()


class Pair:
    """The two processes."""

    def __init__(self, argv: Sequence[str]):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        self._process = subprocess.Popen(
            [*command, *argv, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.gathering: list[float] = []

    def round(self, name: str) -> float:
        assert self._process.stdin and self._process.stdout, "both are pipes"
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("generate: error: the two processes have ended early; what they said is above")
        seconds, gathering = json.loads(line)
        if name == "consolidated":
            self.gathering.append(gathering)
        return seconds

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


def compare(args: argparse.Namespace) -> None:
    """All contestants in turns, then the table."""
    torch.set_num_threads(THREADS)
    pair = Pair(sys.argv[1:])
    contestants: dict[str, Callable[[], float]] = {
        "consolidated": lambda: pair.round("consolidated"),
        "pipeline": lambda: pair.round("pipeline"),
    }
    alone = one_process(args)
    contestants["one process"] = lambda: timed(alone)
    try:
        peer = transformers_round(args)
        contestants["transformers"] = lambda: timed(peer)
    except ImportError:
        print("transformers is not installed (pip install 'megallama[hf]'): its row is left out", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(args.warmup + args.rounds):
        for name, run in contestants.items():
            took = run()
            if turn >= args.warmup:
                seconds[name].append(took)
    pair.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{'':16}{'tokens/s':>10}{'s / round':>11}{'consolidated is':>18}")
    for name, value in medians.items():
        times = value / medians["consolidated"]
        print(f"{name:16}{args.batch * args.tokens / value:10.0f}{value:11.2f}{times:15.2f} x")
    gathering = statistics.median(pair.gathering[args.warmup :])
    print(
        f"gathering the weights: {gathering:.2f} s, {gathering / medians['consolidated']:.1%} of a consolidated round"
    )
    if "transformers" in medians:
        print(f"one process against transformers: {medians['transformers'] / medians['one process']:.2f} x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="prompts a round [32]")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each [64]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer [128]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the most probable token [0]")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each contestant [5]")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before them [1]")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch < 2 or min(args.prompt, args.tokens, args.rounds) < 1 or args.warmup < 0:
        parser.error("--batch must be at least 2, --prompt, --tokens and --rounds at least 1, --warmup at least 0")
    if args.prompt + args.tokens > BENCH.max_position_embeddings:
        parser.error(f"--prompt {args.prompt} and --tokens {args.tokens} exceed {BENCH.max_position_embeddings}")
    if args.worker:
        worker(args)
        return
    shape = f"{BENCH.hidden_size} wide, {BENCH.num_hidden_layers} blocks, vocabulary {BENCH.vocab_size}"
    print(f"torch {torch.__version__}, fp32, {shape}; {args.batch} prompts of {args.prompt} + {args.tokens} tokens")
    compare(args)


if __name__ == "__main__":
    main()
