"""Convert weights between megallama, Hugging Face, Meta and Megatron checkpoints.

python tools/convert_checkpoint.py --from hf --to megallama llama2-7b-hf checkpoints/llama2-7b
python tools/convert_checkpoint.py --from megallama --to hf runs/my_run my_model --dtype bfloat16
python tools/convert_checkpoint.py --from meta --to megatron --tp 8 --pp 4 llama-2-70b megatron-70b
python tools/convert_checkpoint.py --from epfl --to hf megatron-llm-70b llama2-70b-hf --vocab-size 32000
python tools/convert_checkpoint.py --from hf --to meta --tp 8 llama2-70b-hf llama-2-70b --prove

SRC  megallama: a step_… folder, or a run, whose newest checkpoint is taken; hf: a folder with config.json and
     *.safetensors; meta: with params.json and consolidated.NN.pth; megatron, epfl (EPFL's Megatron-LLM): with
     latest_checkpointed_iteration.txt, in --ckpt-format torch.
DST  a new or empty folder. It appears under its name when it is complete; until then the work is beside it in
     .DST.xxxxxxxx.tmp, which stays only if the process is killed, or something takes the name meanwhile. A run starts
     from it with checkpoint.load: DST (megallama) or checkpoint.load: hf:DST.

One tensor at a time is in memory, whatever the model's size. Every tensor is copied bit by bit unless --dtype says
otherwise; one whose shards differ in precision becomes as wide as the widest. What stops a conversion: bytes that fail
their checksum (HF's files have none), copies in SRC that differ, a value that DST's precision would make infinite.
Pickled files (.pth, .pt) are read with weights_only: no code in them is run.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from megallama.checkpoint.formats.convert import SOURCES, WRITERS, Target, convert, sizes
from megallama.checkpoint.formats.hf import SHARD_BYTES
from megallama.checkpoint.formats.megatron import DIALECTS
from megallama.checkpoint.formats.placement import unfinished
from megallama.checkpoint.formats.source import Source
from megallama.checkpoint.formats.tokenizer_files import fitting_tokenizer, tokenizer_in
from megallama.runtime.progress import bytes_progress
from megallama.train.prove import BOUND, prove, refuse_too_big

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
ONLY = {
    "tp": ("megatron", "meta", "megallama"),
    "pp": ("megatron", "megallama"),
    "vpp": ("megatron",),
    "megatron_order": ("megatron",),
    "max_shard_size": ("hf",),
}
"""Option -> the formats that it means something to."""


def size(text: str) -> int:
    """5GB, 500MB, 2GiB or a number of bytes."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?i?)B?", text)
    if not found or found[2] not in UNITS or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return int(found[1]) * UNITS[found[2]]


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to 4096")
    return int(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", required=True, choices=SOURCES, dest="source", help="format of SRC")
    parser.add_argument("--to", required=True, choices=WRITERS, dest="target", help="format of DST")
    parser.add_argument("folder", type=Path, metavar="SRC")
    parser.add_argument("destination", type=Path, metavar="DST")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="precision of DST (keep: each tensor's own, bit by bit)"
    )
    parser.add_argument(
        "--tp", type=positive, metavar="N", help="tensor-parallel ranks; for meta its shards (as Meta published, or 1)"
    )
    parser.add_argument("--pp", type=positive, metavar="N", help="pipeline ranks (1)")
    parser.add_argument("--vpp", type=positive, metavar="N", help="chunks of each of Megatron's pipeline ranks (1)")
    parser.add_argument(
        "--megatron-order",
        choices=DIALECTS,
        help="names and row orders: core (megatron-core; default), local (core without Transformer Engine), "
        "legacy (Megatron-LM before core), epfl (Megatron-LLM)",
    )
    parser.add_argument("--max-shard-size", type=size, metavar="SIZE", help="largest weight file of hf (5GB)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="goes along (SRC's own, where it has one)")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="true size, where a Megatron SRC does not say it: padding is cut"
    )
    parser.add_argument(
        "--prove", action="store_true", help=f"run both on the same tokens; logits must agree to {BOUND} of the largest"
    )
    arguments = parser.parse_args()
    for name, formats in ONLY.items():
        if getattr(arguments, name) is not None and arguments.target not in formats:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} means nothing with --to {arguments.target}, only with {', '.join(formats)}")
    if arguments.vocab_size is not None and arguments.source not in ("megatron", "epfl"):
        parser.error(f"--vocab-size is for --from megatron and epfl; {arguments.source} says its own")
    return arguments


def target_of(arguments: argparse.Namespace, source: Source) -> Target:
    """How DST is to be written.

    Raises:
        ValueError: --tokenizer is none, or not the model's.
    """
    folder, given = source.folder, arguments.tokenizer  # the folder is SRC, or below it
    own = next((place for place in (folder, arguments.folder) if tokenizer_in(place)), folder)
    if given is not None:
        if given.is_dir() and tokenizer_in(given) is None:
            raise ValueError(f"--tokenizer {given} holds neither tokenizer.json nor tokenizer.model")
        fitting_tokenizer(given, source.model)
    tokenizer = given or tokenizer_in(own)
    return Target(
        dtype=DTYPES[arguments.dtype],
        tp=arguments.tp,
        pp=arguments.pp or 1,
        vpp=arguments.vpp or 1,
        order=arguments.megatron_order or "core",
        max_shard_bytes=arguments.max_shard_size or SHARD_BYTES,
        tokenizer=tokenizer,
        like=own,
    )


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def proof(before: Source, arguments: argparse.Namespace) -> str:
    """Run both sides; what came out.

    Raises:
        ValueError: the logits differ.
    """
    form = "epfl" if arguments.megatron_order == "epfl" else arguments.target
    after = SOURCES[form](arguments.destination, None, note)
    found = prove(before, after, DTYPES[arguments.dtype])
    text = (
        f"largest logit difference {found.difference:.2e}, largest logit {found.scale:.3g}, bound "
        f"{BOUND * found.scale:.2e}; SRC in {found.where[0]}, DST in {found.where[1]}, fp32"
    )
    if not found.holds:
        raise ValueError(f"DST does not compute what SRC does: {text}; {arguments.destination} is kept to look into")
    return f"proved: {text}"


def note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> None:
    started, before = time.monotonic(), peak()
    source = SOURCES[arguments.source](arguments.folder, arguments.vocab_size, note)
    if arguments.prove:
        refuse_too_big(source)
    target = target_of(arguments, source)
    todo = sizes(source, target.dtype)
    for path in unfinished(arguments.destination.resolve()):
        note(f"{path} is another attempt at this DST; unless it is still running, it was killed: remove that folder")
    with bytes_progress("converting", todo.stored) as report:
        convert(source, arguments.target, arguments.destination, target, report)
    files = [path for path in arguments.destination.rglob("*") if path.is_file()]
    print(
        f"{arguments.destination}: {todo.tensors:,} tensors, {sum(path.stat().st_size for path in files):,} bytes in "
        f"{len(files)} files, {time.monotonic() - started:.1f} s; peak memory {peak():,.0f} MiB "
        f"({before:,.0f} MiB at the start), largest tensor {todo.largest / 2**20:,.1f} MiB"
    )
    if arguments.prove:
        print(proof(source, arguments))


def _terminated(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)  # through the cleaning up


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        run(arguments)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the third of torch, which finds no memory
        sys.exit(f"convert_checkpoint: error: {next(iter(str(error).splitlines()), type(error).__name__)}")
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; nothing was left behind", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
