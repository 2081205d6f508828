"""Stage `chat`, talked to through a pipe."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import TALKER, frozen

from megallama import cli
from megallama.data import ChatFormat, Message
from megallama.data.tokenizer import SentencePieceTokenizer
from megallama.inference import chat
from megallama.inference.decoding import answer_text
from megallama.inference.generate import seed_of
from megallama.inference.generator import Generator
from megallama.inference.sampling import Request, Sampling

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SEED, TOKENS = 1234, 12


def say(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *more: str) -> str:
    """What the stage prints when `text` is typed, after the commands that it lists at the start."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert cli.main(["chat", "--config", str(run / "run.yaml"), *more]) == 0
    out = capsys.readouterr().out
    assert out.startswith(chat.HELP + "\n")
    return out.removeprefix(chat.HELP + "\n")


class Oracle:
    """The answers of a dialogue, from the generator itself."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self.generator, self.form, self.count = Generator(frozen(model=TALKER), tokenizer), ChatFormat(tokenizer), 0

    def __call__(self, *messages: tuple[str, str], stop: tuple[str, ...] = (), tokens: int = TOKENS) -> str:
        ids = self.form.prompt([Message(*message) for message in messages])
        request = Request(tuple(ids), seed_of(SEED, self.count), Sampling(tokens, stop=stop))
        self.count += 1
        return answer_text(self.form.tokenizer, self.generator.run([request])[0].ids, stop).strip()


@pytest.fixture
def oracle(tokenizer: SentencePieceTokenizer) -> Oracle:
    return Oracle(tokenizer)


def test_a_dialogue(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer knows what was said before; blank lines say nothing; the end of the input ends it."""
    one = oracle(("user", "hello"))
    two = oracle(("user", "hello"), ("assistant", one), ("user", "mat?"))
    shown = say(run, monkeypatch, capsys, "hello\n\n  mat? \n")
    assert [line.strip() for line in shown.split("\n")] == [*f"{one}\n{two}".split("\n"), ""]


def test_commands(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        oracle(("system", "be new"), ("user", "hello")),
        oracle(("system", "be new"), ("user", "mat")),
        oracle(("user", "sat")),
    ]
    typed = "/system be new\nhello\n/reset\nmat\n/system\n/reset\n/help\nsat\n/quit\nnever read\n"
    shown = say(run, monkeypatch, capsys, typed)
    expected = "\n".join([*answers[:2], chat.HELP, answers[2], ""])
    assert [line.strip() for line in shown.split("\n")] == [line.strip() for line in expected.split("\n")]


def test_text_comes_in_pieces_without_what_may_become_a_stop_text(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = oracle(("user", "the llama"), tokens=40)
    letters = [whole[n : n + 3] for n in range(5, len(whole)) if whole[n : n + 3].isascii()]
    stop = next(three for three in letters if three.isalpha())
    oracle.count = 0
    expected = oracle(("user", "the llama"), stop=(stop,), tokens=40)
    assert expected == whole[: whole.index(stop)].strip()
    pieces: list[str] = []
    before = chat.Terminal.say
    monkeypatch.setattr(
        chat.Terminal, "say", lambda self, text, end="\n": (pieces.append(text + end), before(self, text, end))
    )
    shown = say(
        run, monkeypatch, capsys, "the llama\n", "--generate.stop", repr([stop]), "--generate.max_new_tokens", "40"
    )
    assert shown.strip() == expected
    assert "".join(pieces[1:]) == shown
    assert len(pieces) > 5


def test_a_dialogue_that_is_too_long_loses_its_oldest_turns(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = say(run, monkeypatch, capsys, "hello there\nthe mat sat on the llama\nand a new one?\n")
    assert "(the dialogue is too long for the model: its oldest 2 messages are dropped)" in shown
    shown = say(run, monkeypatch, capsys, "x" * 99 + "\nhello\n")
    assert "tokens with the system text, but the model has room for 84 before an answer; shorten it)" in shown
    oracle.count = 0
    assert shown.strip().endswith(oracle(("user", "hello")))


def test_what_the_template_cannot_hold_is_refused(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = say(run, monkeypatch, capsys, "what is [/INST]?\nhello\n")
    note, answer = shown.split("\n", 1)
    assert note.startswith("(") and "the chat template's tag [/INST]" in note
    assert answer.strip() == oracle(("user", "hello"))


def test_ctrl_c_stops_an_answer_and_not_the_dialogue(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, add = [], chat.Printer.add

    def interrupted(self: chat.Printer, token: int) -> None:
        tokens.append(token)
        if len(tokens) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, token)

    monkeypatch.setattr(chat.Printer, "add", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    shown = say(run, monkeypatch, capsys, "hello\n/reset\nmat\n", "--generate.max_new_tokens", "30")
    first = answer_text(oracle.form.tokenizer, tokens[:5]).strip()
    oracle.count = 1
    assert shown.strip() == f"{first}\n{oracle(('user', 'mat'), tokens=30)}"
    assert signal.getsignal(signal.SIGINT) == handler


def test_ctrl_c_while_typing_gives_up_the_line(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hesitant(io.StringIO):
        hesitated = False

        def readline(self, *args: int) -> str:
            if not self.hesitated:
                self.hesitated = True
                os.kill(os.getpid(), signal.SIGINT)
            return super().readline(*args)

    monkeypatch.setattr(sys, "stdin", Hesitant("hello\n"))
    assert cli.main(["chat", "--config", str(run / "run.yaml")]) == 0
    assert capsys.readouterr().out.removeprefix(chat.HELP).strip() == oracle(("user", "hello"))


def test_an_empty_answer_is_forgotten(
    run: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dialogue could not go on from it; here a stop text is all there is of it."""
    answer = oracle(("user", "hello"))
    shown = say(run, monkeypatch, capsys, "hello\n", "--generate.stop", repr([answer[:1]]))
    assert shown.strip() == "(no answer; the message is forgotten)"


@pytest.mark.slow
def test_two_processes_talk_as_one(run: Path, oracle: Oracle) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megallama",
    ]
    command += ["chat", "--config", str(run / "run.yaml"), "--generate.tp"]
    talk = {"input": "hello\n/reset\nmat\n", "capture_output": True, "text": True, "timeout": 120, "env": ENVIRONMENT}
    done = subprocess.run([*command, "2"], **talk)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    answers = oracle(("user", "hello")), oracle(("user", "mat"))
    assert done.stdout.removeprefix(chat.HELP).strip() == "\n".join(answers)
    done = subprocess.run([*command, "1"], **talk)  # type: ignore[call-overload]
    assert done.returncode != 0
    assert "2 ranks with tp=1 make 2 replicas; set generate.tp=2, or start 1 ranks" in done.stderr


def test_the_free_part_is_no_more_than_an_answer_takes(tokenizer: SentencePieceTokenizer) -> None:
    """Prompts of a model with a long context are cut only where the answer would not fit."""
    model = replace(TALKER, max_position_embeddings=400)
    talk = chat.Talk(Generator(frozen(model=model), tokenizer), ChatFormat(tokenizer), Sampling(3), 0)
    talk.turns = [Message("user", "x" * 300)]
    assert len(talk._prompt(None)) <= 397  # type: ignore[arg-type]
