"""Text to an indexed dataset, by many processes, in parts that survive a killed run.

The input is cut into parts that depend on nothing but the files; each part is tokenised into its own small dataset
under OUT.parts/, finished once its .json is there; the end joins them in order. So the result is the same, byte for
byte, for every number of processes, and a run that was stopped goes on with the parts that are missing.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from .indexed import IndexedDataset, IndexedWriter, best_dtype
from .provenance import read_json, write_json
from .text import Reading, Slice, cut, find_files, read
from .tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
BATCH_CHARACTERS = 1 << 18  # text that goes through the tokenizer in one call
EARLY = 1000  # records after which mostly bad input stops a run at once

Report = Callable[[int, int], None]
"""Called with (bytes of input, tokens) done since the last call."""


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens.

    Args:
        tokenizer: path of the tokenizer.
        reading: how documents are found in files.
        append_eod: end each document with the tokenizer's EOS.
        prepend_bos: begin each document with the tokenizer's BOS.
    """

    tokenizer: str
    reading: Reading = field(default_factory=Reading)
    append_eod: bool = True
    prepend_bos: bool = False


class Summary(NamedTuple):
    """What a dataset was made of: `bad` and `empty` records are not among its `documents`."""

    documents: int
    tokens: int
    bad: int
    empty: int


@dataclass(frozen=True)
class Job:
    """One dataset to be made.

    Attributes:
        prefix: OUT; the result is OUT.bin, OUT.idx and OUT.json, bad records go to OUT.bad.jsonl.
        recipe: how documents become tokens.
        parts: the slices of each part.
        settings: all that the tokens depend on; parts made under other settings are of no use.
    """

    prefix: str
    recipe: Recipe
    parts: tuple[tuple[Slice, ...], ...]
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.prefix + ".parts")

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for part in self.parts for piece in part)

    def part(self, n: int) -> str:
        """Prefix of part n's dataset."""
        return str(self.folder / f"{n:06d}")


def plan(inputs: Sequence[str], recipe: Recipe, prefix: str) -> Job:
    """The job that makes `prefix` from `inputs` (files and folders).

    Raises:
        ValueError: bad input name, no tokenizer, or one without the special tokens that the recipe asks for.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    specials(tokenizer, recipe)
    files = find_files(inputs)
    total = sum(os.path.getsize(path) for path in files)
    # Small enough to share out evenly and to lose little when killed, large enough to stay within some 16k files.
    slice_bytes = min(max(total // 4096, 1 << 20), 64 << 20)
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "append_eod": recipe.append_eod,
        "prepend_bos": recipe.prepend_bos,
        **asdict(recipe.reading),
        "files": [[os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files],
    }
    # Through JSON once, so that settings compare equal to those read back from a file.
    return Job(prefix, recipe, tuple(cut(files, recipe.reading, slice_bytes)), json.loads(json.dumps(settings)))


def specials(tokenizer: Tokenizer, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Ids put before and after each document.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if recipe.append_eod and tokenizer.eos is None:
        raise ValueError(f"{recipe.tokenizer} has no EOS token to end documents with; choose --no-append-eod")
    if recipe.prepend_bos and tokenizer.bos is None:
        raise ValueError(f"{recipe.tokenizer} has no BOS token to begin documents with; leave out --prepend-bos")
    before = [tokenizer.bos] if recipe.prepend_bos and tokenizer.bos is not None else []
    return before, [tokenizer.eos] if recipe.append_eod and tokenizer.eos is not None else []


def finished(job: Job) -> Summary | None:
    """The summary of a result that is there already and was made under the same settings, else None."""
    made = read_json(job.prefix + ".json")
    if made is None or made["settings"] != job.settings:
        return None
    try:
        dataset = IndexedDataset(job.prefix)
    except ValueError:
        return None
    summary = Summary(*made["summary"])
    return summary if (len(dataset), dataset.num_tokens) == (summary.documents, summary.tokens) else None


def prepare(job: Job) -> tuple[list[int], str]:
    """Make OUT.parts/ ready, under its lock; returns the parts that are missing and a line about what was found.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        written = job.folder / "settings.json"
        before = read_json(written)
        note = ""
        if before != job.settings:
            if before is not None:
                changed = sorted(key for key in job.settings if before.get(key) != job.settings[key])
                note = f"{job.folder} was begun with other settings ({', '.join(changed)}): starting anew"
            for path in job.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            write_json(written, job.settings)
    except OSError as error:
        raise ValueError(
            f"{job.prefix}: cannot be written ({error.strerror}); choose another --output-prefix"
        ) from None
    missing = [n for n in range(len(job.parts)) if not _is_finished(job, n)]
    if not note and len(missing) < len(job.parts):
        note = f"going on: {len(job.parts) - len(missing)} of {len(job.parts)} parts are done already"
    return missing, note


def _is_finished(job: Job, n: int) -> bool:
    """Whether part n is complete on disk, by its .json (written last) and the ends of its files."""
    info = read_json(job.part(n) + ".json")
    if info is None:
        return False
    try:
        return IndexedDataset(job.part(n)).num_tokens == info["tokens"]
    except ValueError:
        return False


@contextmanager
def holding(folder: Path, exclusive: bool = False, patience: float = 10.0) -> Iterator[None]:
    """Hold `folder`'s lock: every process that writes there shares it; preparing and joining need it alone.

    Locks end with their process, also with a killed one; its workers follow within seconds, hence some patience.

    Raises:
        ValueError: someone else holds it for longer than `patience` seconds, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another --output-prefix") from None
    with file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder} is in use by another run; wait for it, or end it first") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks: go on without
                break
        yield


def encode_part(job: Job, n: int, tokenizer: Tokenizer, report: Report) -> None:
    """Tokenise part n into its own dataset; its .json, written last, says that it is complete.

    Raises:
        ValueError: a file cannot be read, or nearly all records so far are bad.
    """
    before, after = specials(tokenizer, job.recipe)
    bad = empty = 0
    lines: list[int] = []  # records of each slice, so that bad ones can be numbered within their file
    with (
        open(job.part(n) + ".bad.jsonl", "w", encoding="utf-8") as quarantine,
        IndexedWriter(job.part(n), best_dtype(tokenizer.vocab_size)) as writer,
    ):
        texts: list[str] = []

        def flush() -> int:
            tokens = writer.num_tokens
            for ids in tokenizer.encode_batch(texts):
                writer.add_document(before + ids + after)
            texts.clear()
            return writer.num_tokens - tokens

        for i, piece in enumerate(job.parts[n]):
            lines.append(0)
            waiting = reported = 0
            for record in read(piece, job.recipe.reading):
                lines[i] = record.line
                if record.text is None:
                    bad += 1
                    raw = record.raw.decode("utf-8", "backslashreplace")
                    entry = {"slice": i, "line": record.line, "problem": record.problem, "text": raw}
                    quarantine.write(json.dumps(entry) + "\n")
                    _stop_early(piece, record.problem, bad, sum(lines))
                elif not record.text:
                    empty += 1
                else:
                    texts.append(record.text)
                    waiting += len(record.text)
                if waiting >= BATCH_CHARACTERS:
                    report(record.done - reported, flush())
                    waiting, reported = 0, record.done
            report(piece.size - reported, flush())
    info = {"documents": writer.num_documents, "tokens": writer.num_tokens, "bad": bad, "empty": empty, "lines": lines}
    write_json(job.part(n) + ".json", info)


def _stop_early(piece: Slice, problem: str, bad: int, seen: int) -> None:
    """Input that is mostly bad (a wrong key, the wrong file) need not be read to its end."""
    if seen >= EARLY and bad > seen // 2:
        raise ValueError(f"{piece.path}: {bad} of the first {seen} records are bad, the last one: {problem}")


def _work(job: Job, parts: Sequence[int], counter: Any, pipe: Connection) -> None:
    """A worker process: takes the next part until none is left. Sends (bytes, tokens), or a line about a failure.

    When the parent has gone, the next send fails and ends the worker.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process, as the processes fill the cores
    try:
        tokenizer = load_tokenizer(job.recipe.tokenizer)
        with holding(job.folder):
            while True:
                with counter.get_lock():
                    taken = counter.value
                    counter.value += 1
                if taken >= len(parts):
                    return
                encode_part(job, parts[taken], tokenizer, lambda size, tokens: pipe.send((size, tokens)))
    except BrokenPipeError:
        return
    except Exception as error:
        with suppress(BrokenPipeError):
            pipe.send(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return


def encode(job: Job, parts: Sequence[int], workers: int, report: Report) -> None:
    """Tokenise `parts` of the job in `workers` processes.

    Raises:
        ValueError: a worker failed; the others have been stopped, finished parts stay.
    """
    context = multiprocessing.get_context("spawn")  # forking a process that has threads or MPI is not safe
    counter = context.Value("q", 0)
    processes, pipes = [], {}
    try:
        for _ in range(min(workers, len(parts))):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, parts, counter, sender), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes[receiver] = process
        while pipes:
            for ready in wait(list(pipes)):
                assert isinstance(ready, Connection), "only the workers' pipes are waited for"
                try:
                    message = ready.recv()
                except EOFError:
                    process = pipes.pop(ready)
                    process.join()
                    if process.exitcode:
                        raise ValueError(
                            f"a worker ended with exit code {process.exitcode} (out of memory?); "
                            "the same command continues, perhaps with fewer --workers"
                        ) from None
                    continue
                if isinstance(message, str):
                    raise ValueError(message)
                report(*message)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def join(job: Job, max_bad_fraction: float) -> Summary:
    """Join the finished parts into the result and remove them.

    Raises:
        ValueError: too many bad records, or no document at all; nothing is written but OUT.bad.jsonl.
    """
    infos = [read_json(job.part(n) + ".json") or {} for n in range(len(job.parts))]
    documents, tokens, bad, empty = (sum(i[k] for i in infos) for k in ("documents", "tokens", "bad", "empty"))
    summary = Summary(documents, tokens, bad, empty)
    first = _quarantine(job, [info["lines"] for info in infos], bad)
    if bad > max_bad_fraction * (documents + bad):
        raise ValueError(
            f"{bad} of {documents + bad} records are bad, more than --max-bad-fraction {max_bad_fraction:g} allows; "
            f"the first is {first}; all are in {job.prefix}.bad.jsonl: mend them, or allow more"
        )
    if not documents:
        raise ValueError(f"the input holds no document ({empty} empty records); check --input and --json-keys")
    with IndexedWriter(job.prefix, best_dtype(job.settings["vocab_size"])) as writer:
        for n in range(len(job.parts)):
            writer.extend(IndexedDataset(job.part(n)))
    write_json(job.prefix + ".json", {"settings": job.settings, "summary": summary})
    shutil.rmtree(job.folder)
    return summary


def _quarantine(job: Job, lines: Sequence[Sequence[int]], bad: int) -> str:
    """Write OUT.bad.jsonl (file, line, problem, text) if there are bad records; returns a line about the first."""
    target = Path(job.prefix + ".bad.jsonl")
    target.unlink(missing_ok=True)
    if not bad:
        return ""
    first = ""
    passed: dict[str, int] = {}  # records of each file in the slices before
    with target.open("w", encoding="utf-8") as out:
        for n, part in enumerate(job.parts):
            base = []
            for piece, count in zip(part, lines[n], strict=True):
                base.append(passed.get(piece.path, 0))
                passed[piece.path] = base[-1] + count
            with open(job.part(n) + ".bad.jsonl", encoding="utf-8") as file:
                for entry in map(json.loads, file):
                    piece, line = part[entry["slice"]], base[entry["slice"]] + entry["line"]
                    first = first or f"{piece.path} line {line}: {entry['problem']}"
                    record = {"file": piece.path, "line": line, "problem": entry["problem"], "text": entry["text"]}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
    return first
