"""Stage `generate`: answers to prompts, from the configuration or a file, on the terminal or in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megallama.config import Config
from megallama.data import ChatFormat, Message, Tokenizer, key, read_prompts
from megallama.data.record_files import split_name
from megallama.data.text import TEXT, kind_of
from megallama.files import make_folder, write_whole
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
    output = config.generate.output
    with on_mesh(config, lambda: "generate") as mesh:
        first = mesh.world.rank == 0
        if first and output:
            _check_output(output)
        generator = Generator(frozen(config, mesh, source), tokenizer, config.generate.rows)
        answers = generator.run(requests, watch=partial(items_progress, shown=first))
        rows = [written_answer(a, b, tokenizer, sampling) for a, b in zip(asked, answers, strict=True)]
        if first and output:
            _write(output, rows)
            print(f"{len(rows)} answers, {sum(row['tokens'] for row in rows)} tokens, in {output}")
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
    elif kind_of(split_name(asked.file)[0])[0] == TEXT:
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


def _check_output(name: str) -> None:
    """Before anything is generated.

    Raises:
        ValueError: the file cannot be written, as far as that shows by now.
    """
    if Path(name).is_dir():
        raise ValueError(f"generate.output={name} cannot be written: it is a folder")
    try:
        make_folder(Path(name).parent)
    except ValueError as error:
        raise ValueError(f"generate.output={name}: {error}") from None


def _write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as JSON lines.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        write_whole(Path(name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise ValueError(f"generate.output={name} cannot be written: {error.strerror or error}") from error
