"""Tokenise text into an indexed dataset: OUT.bin and OUT.idx in Megatron's format, an EOS after each document.

python tools/preprocess_data.py --input corpus/*.jsonl --tokenizer tokenizer.model --output-prefix corpus --workers 8
mpirun -n 4 python tools/preprocess_data.py … --workers 32        many nodes; each rank runs that many processes

Reads JSONL (.jsonl .ndjson .json), parquet and plain text (.txt .text .md .rst), all but parquet also as .gz and .zst,
and folders of them. The result is the same byte for byte for every number of workers and ranks. Work is kept in
OUT.parts/: after a stop, the same command goes on. Bad records are listed in OUT.bad.jsonl; OUT.json says what the
data was made of, and an OUT that is complete and up to date is not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megallama.data.preprocess import Job, Recipe, Report, Summary, encode, finished, holding, join, plan, prepare
from megallama.data.text import Reading

MPI_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MPI_LOCALRANKID")
PLAIN_SECONDS = 10.0
T = TypeVar("T")


class Alone:
    """The communicator of a single process: one rank is a degenerate group."""

    rank, size = 0, 1

    def bcast(self, value: T) -> T:
        return value

    def allgather(self, value: T) -> list[T]:
        return [value]


def communicator() -> Any:
    """MPI's world under an MPI launcher, else one process alone; mpi4py is needed only in the first case."""
    if not any(name in os.environ for name in MPI_RANK_VARIABLES):
        return Alone()
    try:
        from mpi4py import MPI
    except ImportError:
        sys.exit("preprocess_data: error: started by an MPI launcher, which needs: pip install mpi4py")
    return MPI.COMM_WORLD


def agreed(comm: Any, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, all ranks end, with one line from the first that failed.

    Raises:
        SystemExit: it failed somewhere.
    """
    result: Any = None
    problem = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    except Exception:  # a defect of ours: its trace is wanted, and the other ranks must not wait for this one
        problem = traceback.format_exc()
    problems = [problem for problem in comm.allgather(problem) if problem]
    if problems:
        sys.exit(f"preprocess_data: error: {problems[0]}" if comm.rank == 0 else 1)
    return result


def first(comm: Any, action: Callable[[], T]) -> T:
    """The result of `action` on rank 0, on every rank."""
    return comm.bcast(agreed(comm, action if comm.rank == 0 else lambda: None))


@contextmanager
def progress(label: str, total: int, shown: bool) -> Iterator[Report]:
    """A live bar on a terminal, a line every few seconds elsewhere, nothing where not `shown`."""
    console = Console(stderr=True)
    started = last = time.monotonic()
    size = tokens = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total, rate="")

        def report(more_bytes: int, more_tokens: int) -> None:
            nonlocal size, tokens, last
            size, tokens, now = size + more_bytes, tokens + more_tokens, time.monotonic()
            rate = f"{tokens / max(now - started, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=size, rate=rate)
            if shown and not console.is_terminal and now - last >= PLAIN_SECONDS and size:
                last, left = now, (now - started) * (total - size) / size
                console.print(
                    f"{label} {size / total:.1%}, {tokens:,} tokens, {rate}, ETA {left:,.0f} s", soft_wrap=True
                )

        yield report


def run(arguments: argparse.Namespace, comm: Any) -> tuple[Job, Summary]:
    """Prepare on rank 0, tokenise each rank's share of the missing parts, join on rank 0."""
    reading = Reading(tuple(arguments.json_keys), arguments.split_lines, arguments.max_document_bytes)
    recipe = Recipe(arguments.tokenizer, reading, arguments.append_eod, arguments.prepend_bos)
    job: Job = first(comm, lambda: plan(arguments.input, recipe, arguments.output_prefix))
    done: Summary | None = first(comm, lambda: finished(job))
    if done is not None:
        return job, done

    def begin() -> list[int]:
        with holding(job.folder, exclusive=True):
            missing, note = prepare(job)
        if note:
            print(note, file=sys.stderr)
        return missing

    missing = first(comm, begin)[comm.rank :: comm.size]
    label = "tokenising" if comm.size == 1 else f"tokenising (rank 0 of {comm.size})"
    size = sum(piece.size for n in missing for piece in job.parts[n])

    def work() -> None:
        with holding(job.folder), progress(label, size, comm.rank == 0) as report:
            encode(job, missing, arguments.workers, report)

    agreed(comm, work)

    def end() -> Summary:
        with holding(job.folder, exclusive=True):
            return join(job, arguments.max_bad_fraction)

    return job, first(comm, end)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files and folders")
    parser.add_argument(
        "--tokenizer", required=True, help="a .model of train_tokenizer.py, tokenizer.json or HF folder"
    )
    parser.add_argument("--output-prefix", required=True, metavar="OUT", help="writes OUT.bin, OUT.idx and OUT.json")
    parser.add_argument("--workers", type=int, help="processes (of each rank); default: all cores, one under mpirun")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields that make a document (text)"
    )
    parser.add_argument("--split-lines", action="store_true", help="plain text has a document a line, not one a file")
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True, help="EOS after each document (on)"
    )
    parser.add_argument("--prepend-bos", action="store_true", help="BOS before each document")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="bad records above this share stop the run (%(default)s)"
    )
    parser.add_argument(
        "--max-document-bytes", type=int, default=64 << 20, metavar="N", help="longer records are bad (64 MiB)"
    )
    arguments = parser.parse_args()
    if arguments.workers is None:
        under_mpi = any(name in os.environ for name in MPI_RANK_VARIABLES)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        arguments.workers = 1 if under_mpi else cores
    for name, low, high in (("workers", 1, 4096), ("max_bad_fraction", 0, 1), ("max_document_bytes", 1, 1 << 31)):
        value = getattr(arguments, name)
        if not low <= value <= high:
            sys.exit(f"preprocess_data: error: --{name.replace('_', '-')} {value} must be from {low} to {high}")
    return arguments


def main() -> None:
    arguments, started = parse(), time.monotonic()
    comm = communicator()
    try:
        job, made = run(arguments, comm)
    except KeyboardInterrupt:
        print("preprocess_data: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if comm.rank == 0:
        bad = f", {made.bad:,} bad records in {job.prefix}.bad.jsonl" if made.bad else ""
        empty = f", {made.empty:,} empty records left out" if made.empty else ""
        print(
            f"{job.prefix}: {made.documents:,} documents, {made.tokens:,} tokens{bad}{empty}, "
            f"{time.monotonic() - started:.1f} s"
        )


if __name__ == "__main__":
    main()
