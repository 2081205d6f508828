"""Stage `generate`: answers to prompts, from the configuration or a file, on the terminal or in a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megallama.config import Config
from megallama.data import ChatFormat, Message, Tokenizer, key, read_prompts
from megallama.data.text import TEXT, kind_of
from megallama.inference.decoding import answer_text
from megallama.inference.generator import Generator
from megallama.inference.opening import open_model, sampling_of
from megallama.inference.sampling import Answer, Request, Sampling
from megallama.runtime.progress import items_progress
from megallama.train.models import frozen
from megallama.train.run import on_mesh


class Asked(NamedTuple):
    """A prompt: its name among all of them, its messages, and the ids up to where the answer begins."""

    key: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...]


def run(config: Config) -> int:
    """Answer generate.prompts or generate.file; returns the exit code. Every rank of the launch calls it."""
    config, source, tokenizer = open_model(config)
    asked, sampling = read_asked(config, tokenizer), sampling_of(config)
    requests = [Request(prompt.ids, seed_of(config.generate.seed, n), sampling) for n, prompt in enumerate(asked)]
    with on_mesh(config, lambda: "generate") as mesh:
        first = mesh.world.rank == 0
        with _output(config.generate.output if first else None) as rows:
            generator = Generator(frozen(config, mesh, source), tokenizer, config.generate.rows)
            with items_progress("answers", len(range(0, len(asked), mesh.dp.size)), first) as report:
                answers = generator.run(requests, on_answer=lambda number, answer: report(1))
            rows += [written_answer(a, b, tokenizer, sampling) for a, b in zip(asked, answers, strict=True)]
        if first and config.generate.output:
            print(f"{len(rows)} answers, {sum(row['tokens'] for row in rows)} tokens, in {config.generate.output}")
        elif first:
            for row in rows:
                print(f"{row['prompt']!r} → {row['answer']!r}")
    return 0


def read_asked(config: Config, tokenizer: Tokenizer) -> list[Asked]:
    """The prompts that generate.* names, as ids.

    Raises:
        ValueError: none or two places of prompts, a bad record, or a dialogue where text is to be continued.
    """
    asked = config.generate
    if bool(asked.prompts) == bool(asked.file):
        what = "are both set" if asked.file else "are both empty"
        raise ValueError(f"generate.prompts and generate.file {what}; give the prompts in one of them")
    found: list[tuple[str, tuple[Message, ...]]]
    if not asked.file:
        found = [(str(n), (Message("user", text),)) for n, text in enumerate(asked.prompts, 1)]
    elif kind_of(asked.file)[0] == TEXT:
        found = [(name, (Message("user", line),)) for name, line in _lines(Path(asked.file))]
    else:
        found = [(prompt.key, prompt.messages) for prompt in read_prompts(asked.file)]
    encode = _chat(config, tokenizer) if asked.chat else _continued(asked.start, tokenizer)
    return [Asked(name, messages, tuple(encode(messages))) for name, messages in found]


def _lines(path: Path) -> list[tuple[str, str]]:
    """(number, text) of each line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"generate.file={path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"generate.file={path} is not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [(str(n), line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"generate.file={path} holds no prompt; write one a line")
    return lines


def _chat(config: Config, tokenizer: Tokenizer) -> Callable[[Sequence[Message]], list[int]]:
    return ChatFormat(tokenizer, config.chat.separator).prompt


def _continued(start: str, tokenizer: Tokenizer) -> Callable[[Sequence[Message]], list[int]]:
    """Ids of a text that the model is to continue."""
    first = {"eos": tokenizer.eos, "bos": tokenizer.bos, "none": None}[start]
    before = [] if first is None else [first]

    def encode(messages: Sequence[Message]) -> list[int]:
        if len(messages) > 1:
            raise ValueError(
                f"a prompt has {len(messages)} messages (the first: {messages[0].content[:40]!r}), which plain text "
                f"cannot hold; set generate.chat true"
            )
        return [*before, *tokenizer.encode(messages[0].content)]

    return encode


def seed_of(seed: int, number: int) -> int:
    """The seed of the number-th request of a run."""
    return int(key(seed, number)) >> 1


def written_answer(asked: Asked, answer: Answer, tokenizer: Tokenizer, sampling: Sampling) -> dict[str, Any]:
    """An answer as a line of generate.output; `log_prob` is the sum over its tokens."""
    first, *more = asked.messages
    return {
        "id": asked.key,
        "prompt": [{"role": m.role, "content": m.content} for m in asked.messages] if more else first.content,
        "answer": answer_text(tokenizer, answer.ids, sampling.stop),
        "finish": answer.finish,
        "finished": answer.finish != "length",
        "tokens": len(answer.ids),
        "log_prob": math.fsum(answer.log_probs),
    }


@contextmanager
def _output(name: str | None) -> Iterator[list[dict[str, Any]]]:
    """A list whose rows become the JSON lines of a file, which appears when it is complete. None = no file.

    Raises:
        ValueError: it cannot be written; told before anything is generated, where that shows by then.
    """
    rows: list[dict[str, Any]] = []
    if name is None:
        yield rows
        return
    path = Path(name)
    work = path.with_name(path.name + ".tmp")
    with _named(name):
        path.parent.mkdir(parents=True, exist_ok=True)
        work.touch()
    try:
        yield rows
        with _named(name), work.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            work.replace(path)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def _named(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"generate.output={output} cannot be written: {error.strerror or error}") from error
