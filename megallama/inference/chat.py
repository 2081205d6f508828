"""Stage `chat`: a dialogue with a model, whose words appear as they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from megallama.config import Config
from megallama.data import ChatFormat, Message, Tokenizer
from megallama.inference.decoding import TextStream, answer_text, before_stop
from megallama.inference.generate import seed_of
from megallama.inference.generator import Generator
from megallama.inference.opening import open_model, sampling_of
from megallama.inference.sampling import Request, Sampling
from megallama.parallel.collectives import all_reduce
from megallama.runtime.mesh import Mesh
from megallama.train.models import frozen
from megallama.train.run import on_mesh

HELP = """/system TEXT   set what the model is told before the dialogue (without a text: nothing)
/reset         forget the dialogue
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""

PATIENCE = timedelta(days=7)
"""That the other ranks wait for somebody to type."""

KEPT_FREE = 4
"""The part of the model's longest sequence that is kept free for an answer is one in so many."""


class Interrupted(Exception):
    """The answer is not wanted any further. Raised on all ranks at the same token."""


def run(config: Config) -> int:
    """Talk with the person, or the program, at rank 0's standard input; returns the exit code."""
    config, source, tokenizer = open_model(config)
    form = ChatFormat(tokenizer, config.chat.separator)
    with on_mesh(config, lambda: "chat") as mesh:
        if mesh.dp.size > 1:
            raise ValueError(
                f"chat gives one answer at a time, but {mesh.world.size} ranks with tp={mesh.tp.size} make "
                f"{mesh.dp.size} replicas; set generate.tp={mesh.world.size}, or start {mesh.tp.size} ranks"
            )
        generator = Generator(frozen(config, mesh, source), tokenizer, rows=1)
        talk = Talk(generator, form, sampling_of(config), config.generate.seed)
        with Terminal(mesh) as terminal:
            terminal.say(HELP)
            while (line := terminal.read()) is not None and line != "/quit":
                talk.hear(line, terminal)
    return 0


class Terminal:
    """Rank 0's standard input and output, as all ranks see them: they read the same lines and learn of the same Ctrl-C;
    only rank 0 speaks."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.first = mesh, mesh.world.rank == 0
        # A group of its own, since the others lose patience with somebody who thinks.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if mesh.world.size > 1 else None
        self._answering, self._interrupted = False, False

    def __enter__(self) -> Terminal:
        self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        if self.first and sys.stdin.isatty():
            import readline  # noqa: F401  (makes `input` edit lines)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.first and not self._answering:
            raise KeyboardInterrupt
        self._interrupted = True

    def read(self) -> str | None:
        """The next line, without blanks around it; None at the end. Collective."""
        box = [self._read() if self.first else None]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _read(self) -> str | None:
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:  # gives up the line, not the dialogue
                print()

    def say(self, text: str, end: str = "\n") -> None:
        if self.first:
            print(text, end=end, flush=True)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer comes, Ctrl-C is only noted."""
        self._answering, self._interrupted = True, False
        try:
            yield
        finally:
            self._answering = False

    def check(self) -> None:
        """Collective.

        Raises:
            Interrupted: rank 0 was asked to stop, on all ranks.
        """
        asked = torch.tensor(float(self.first and self._interrupted), device=self.mesh.device)
        if all_reduce(asked, self.mesh.world).item():
            raise Interrupted


class Printer:
    """An answer on the terminal while its tokens come: no half character, and nothing of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], terminal: Terminal):
        self.tokenizer, self.stops, self.terminal = tokenizer, stops, terminal
        self.ids: list[int] = []
        self._stream, self._shown = TextStream(tokenizer), 0
        self._held = max(map(len, stops), default=1) - 1  # so much may still turn out to be a stop text's beginning

    def add(self, token: int) -> None:
        """Take one token, unless the person wants no more."""
        self.ids.append(token)
        if token != self.tokenizer.eos:
            self._stream.add(token)
            text = self._stream.text
            self._show(min(before_stop(text, self.stops), text[: max(0, len(text) - self._held)], key=len))
        self.terminal.check()

    def end(self) -> str:
        """Show the rest; returns the whole answer."""
        text = answer_text(self.tokenizer, self.ids, self.stops)
        self._show(text)
        self.terminal.say("")
        return text.strip()

    def _show(self, text: str) -> None:
        if not self._shown:  # blanks before the first word
            self._shown = len(text) - len(text.lstrip())
        if len(text) > self._shown:
            self.terminal.say(text[self._shown :], end="")
            self._shown = len(text)


class Talk:
    """One dialogue.

    Args:
        seed: of the answers; the n-th one's is its own.
    """

    def __init__(self, generator: Generator, form: ChatFormat, sampling: Sampling, seed: int):
        self.generator, self.form, self.sampling, self.seed = generator, form, sampling, seed
        self.system, self.turns, self.answers = "", list[Message](), 0

    def hear(self, line: str, terminal: Terminal) -> None:
        """Do what a line says: a command, or a message to answer."""
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/system":
            self.system = rest.strip()
        elif command == "/reset":
            self.turns = []
        elif command.startswith("/"):
            terminal.say(HELP)
        else:
            self._answer(line, terminal)

    def _answer(self, line: str, terminal: Terminal) -> None:
        self.turns.append(Message("user", line))
        try:
            prompt = self._prompt(terminal)
        except ValueError as error:
            self.turns.pop()
            terminal.say(f"({error})")
            return
        request = Request(tuple(prompt), seed_of(self.seed, self.answers), self.sampling)
        printer = Printer(self.form.tokenizer, self.sampling.stop, terminal)
        with terminal.answering():
            with suppress(Interrupted):
                self.generator.run([request], on_token=lambda number, token: printer.add(token))
            text = printer.end()
        self.answers += 1
        if text:
            self.turns.append(Message("assistant", text))
        else:  # nothing that a dialogue could go on from
            self.turns.pop()
            terminal.say("(no answer; the message is forgotten)")

    def _prompt(self, terminal: Terminal) -> list[int]:
        """Ids of the dialogue, without its oldest turns where all of it leaves too little room for an answer.

        Raises:
            ValueError: the newest message alone leaves too little, or the template cannot hold a text.
        """
        longest = self.generator.trainer.config.model.max_position_embeddings
        free = max(1, min(self.sampling.max_new_tokens, longest // KEPT_FREE))
        system = [Message("system", self.system)] if self.system else []
        dropped = 0
        while len(ids := self.form.prompt([*system, *self.turns])) > longest - free:
            if len(self.turns) == 1:
                raise ValueError(
                    f"the message takes {len(ids)} tokens with the system text, but the model has room for "
                    f"{longest - free} before an answer; shorten it"
                )
            del self.turns[:2]
            dropped += 2
        if dropped:
            terminal.say(f"(the dialogue is too long for the model: its oldest {dropped} messages are dropped)")
        return ids
