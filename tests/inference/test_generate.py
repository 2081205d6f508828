"""Stage `generate` as users start it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import TALKER, RandomSource, frozen, trainer_log_probs, uncached

from megallama import cli
from megallama.checkpoint.formats import StoreSource, write_hf
from megallama.checkpoint.formats.native import write_store
from megallama.config import Config, load
from megallama.data import ChatFormat, Message
from megallama.data.tokenizer import SentencePieceTokenizer
from megallama.inference.decoding import answer_text
from megallama.inference.generate import read_asked, seed_of
from megallama.inference.generator import Generator
from megallama.inference.sampling import Request, Sampling
from megallama.runtime import progress

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RECORDS = [
    {"id": "a", "prompt": "the llama sat"},
    {"id": "b", "messages": [{"role": "system", "content": "be new"}, {"role": "user", "content": "hello there"}]},
    {"messages": [{"role": "user", "content": m} for m in ("and?",)]},
    {"id": 7, "prompt": "the llama sat"},
]


def generate(run: Path, *more: str) -> None:
    assert cli.main(["generate", "--config", str(run / "run.yaml"), *more]) == 0


def error(run: Path, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that an error is told in."""
    try:
        assert cli.main(["generate", "--config", str(run / "run.yaml"), *more]) != 0
    except SystemExit as left:  # once the ranks have met
        assert left.code != 0
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megallama: error")
    return err


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_texts_are_continued(run: Path, tokenizer: SentencePieceTokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    """Behind an EOS, as in pretraining, or what generate.start says."""
    trainer = frozen(model=TALKER)
    for start, first in (("eos", [tokenizer.eos]), ("bos", [tokenizer.bos]), ("none", [])):
        texts = ["the llama", "new 🦙"]
        generate(
            run,
            "--generate.prompts",
            json.dumps(texts, ensure_ascii=False),
            "--generate.temperature",
            "0",
            "--generate.start",
            start,
        )
        shown = capfd.readouterr().out.splitlines()
        for text, line in zip(texts, shown, strict=True):
            request = Request((*first, *tokenizer.encode(text)), 0, Sampling(12, 0))  # type: ignore[arg-type]
            expected = answer_text(tokenizer, uncached(trainer, request, tokenizer.eos))
            assert line == f"{text!r} → {expected!r}"


def test_answers_are_written(
    run: Path, prompts: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    generate(run, "--generate.file", str(prompts), "--generate.chat", "true", "--generate.output", str(out))
    told = capfd.readouterr().out
    rows, form, trainer = records(out), ChatFormat(tokenizer), frozen(model=TALKER)
    assert f"4 answers, {sum(row['tokens'] for row in rows)} tokens, in {out}" in told
    assert [row["id"] for row in rows][:2] == ["a", "b"] and rows[3]["id"] == "7"
    assert rows[1]["prompt"] == RECORDS[1]["messages"]
    assert rows[0]["prompt"] == rows[3]["prompt"] == "the llama sat"
    assert rows[0]["answer"] != rows[3]["answer"]  # each has a seed of its own
    for number, (row, record) in enumerate(zip(rows, RECORDS, strict=True)):
        given: Any = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        ids = tuple(form.prompt([Message(**message) for message in given]))
        request = Request(ids, seed_of(load([]).generate.seed, number), Sampling(12))
        (answer,) = Generator(trainer, tokenizer).run([request])
        assert row["answer"] == answer_text(tokenizer, answer.ids)
        assert (row["finish"], row["finished"]) == (answer.finish, answer.finish == "eos")
        assert row["tokens"] == len(answer.ids)
        assert row["log_prob"] == pytest.approx(math.fsum(trainer_log_probs(trainer, request, answer)), abs=1e-9)
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl"]


def test_a_text_file_has_a_prompt_a_line(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("the mat\n\n \nhello  there \n")
    out = tmp_path / "answers.jsonl"
    generate(run, "--generate.file", str(tmp_path / "prompts.txt"), "--generate.output", str(out))
    assert [(row["id"], row["prompt"]) for row in records(out)] == [("1", "the mat"), ("4", "hello  there ")]


def test_answers_end_at_stop_texts(run: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    free, stopped = tmp_path / "free.jsonl", tmp_path / "stopped.jsonl"
    generate(run, "--generate.prompts", '["the"]', "--generate.output", str(free), "--generate.max_new_tokens", "40")
    text = records(free)[0]["answer"]
    stop = text[len(text) // 2 :][:2]
    more = ["--generate.stop", json.dumps([stop]), "--generate.max_new_tokens", "40"]
    generate(run, "--generate.prompts", '["the"]', "--generate.output", str(stopped), *more)
    (row,) = records(stopped)
    assert (row["answer"], row["finish"], row["finished"]) == (text[: text.index(stop)], "stop", True)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hf"])
def test_a_model_is_found_by_its_path(
    kind: str, run: Path, tokenizer_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run, a checkpoint's folder, or an HF folder with its own tokenizer; nothing else of a run is needed."""
    generate(run, "--generate.prompts", '["the mat"]')
    expected = capfd.readouterr().out
    path = {"run": run, "checkpoint": run / "checkpoints" / "step_00000003", "hf": tmp_path / "hf"}[kind]
    tokenizer = [] if kind == "hf" else ["--data.tokenizer", str(tokenizer_file)]
    if kind == "hf":
        write_hf(StoreSource(run), path, tokenizer=tokenizer_file)
    arguments = ["--generate.model", str(path), "--train.dtype", "float64", "--generate.max_new_tokens", "12"]
    assert cli.main(["generate", "--generate.prompts", '["the mat"]', *arguments, *tokenizer]) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--generate.tp 2", "--generate.tp 1", "--parallel.pp 2"])
def test_two_processes_write_the_same_answers(layout: str, run: Path, prompts: Path, tmp_path: Path) -> None:
    """Tensor parallel, two replicas, and two replicas for a run that was trained in a pipeline."""
    files = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    arguments = ["--generate.file", str(prompts), "--generate.chat", "true", "--generate.rows", "2"]
    generate(run, *arguments, "--generate.output", str(files[0]))
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
    command += ["generate", "--config", str(run / "run.yaml"), *arguments, *layout.split()]
    done = subprocess.run(
        [*command, "--generate.output", str(files[1])], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    one, two = ([{**row, "log_prob": round(row["log_prob"], 9)} for row in records(file)] for file in files)
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["generate.prompts and generate.file are both empty"]),
        ("--generate.prompts ['a'] --generate.file {prompts}", ["are both set"]),
        ("--generate.file {prompts}", ["2 messages", "'be new'", "set generate.chat true"]),
        ("--generate.file {folder}/none.txt", ["none.txt cannot be read: No such file"]),
        ("--generate.file {folder}/none.jsonl", ["none.jsonl", "no such file"]),
        ("--generate.file {folder}/empty.txt", ["empty.txt holds no prompt"]),
        ("--generate.file {folder}/latin.txt", ["latin.txt is not UTF-8", "byte 3"]),
        ("--generate.prompts ['a'] --generate.tp 2", ["generate.tp=2", "1 ranks cannot be laid out"]),
        ("--generate.prompts ['a'] --generate.tp 3", ["generate.tp=3", "num_attention_heads=4 is not divisible"]),
        ("--generate.prompts ['a'] --generate.model {folder}", ["holds no manifest.json"]),
        ("--generate.prompts ['a'] --generate.model {folder}/x", ["is no folder of a run"]),
        ("--generate.prompts ['a'] --generate.output {prompts}/x", ["generate.output=", "cannot be written"]),
        ("--generate.prompts ['a'] --generate.output {folder}", ["generate.output=", "cannot be written"]),
        ("--generate.prompts ['{long}']", ["request 0: its prompt of", "max_position_embeddings is 96"]),
        ("--generate.prompts ['a'] --model.hidden_size 64", ["hidden_size is 32 there, 64 here"]),
        ("--generate.prompts ['a'] --generate.top_p 0", ["generate.top_p=0"]),
        ("--generate.prompts ['a'] --generate.top_k -1", ["generate.top_k=-1 must be at least 0"]),
        ("--generate.prompts ['a'] --generate.temperature -1", ["generate.temperature=-1"]),
        ("--generate.prompts ['a'] --generate.temperature .inf", ["generate.temperature=inf"]),
        ("--generate.prompts ['a'] --generate.rows 0", ["generate.rows=0"]),
        ("--generate.prompts ['a'] --generate.start both", ["unknown generate.start both", "eos, bos, none"]),
        ("--generate.prompts ['a'] --generate.stop ['']", ["generate.stop has an empty text"]),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: str, words: list[str], run: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    before = sorted(tmp_path.rglob("*"))
    filled = [part.format(prompts=prompts, folder=tmp_path, long="x" * 99) for part in arguments.split()]
    text = error(run, capfd, *filled)
    assert all(word in text for word in words), text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_a_tokenizer_or_an_lm_head_is_refused(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"output_dir: {run}\n")
    asked = ["--generate.prompts", '["a"]']
    assert "data.tokenizer is empty, and" in error(tmp_path, capfd, *asked)
    write_store(RandomSource(replace(TALKER, head="scalar")), tmp_path / "reward")
    assert "is a reward model" in error(run, capfd, *asked, "--generate.model", str(tmp_path / "reward"))


def test_an_answer_that_fails_leaves_no_file(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("of an earlier call\n")
    error(run, capfd, "--generate.prompts", json.dumps(["a" * 99]), "--generate.output", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert out.read_text() == "of an earlier call\n"


def test_prompts_in_the_chat_template_may_come_from_the_configuration(
    tokenizer: SentencePieceTokenizer,
) -> None:
    config = Config()
    config = replace(config, generate=replace(config.generate, prompts=("hello there",), chat=True))
    (asked,) = read_asked(config, tokenizer)
    assert list(asked.ids) == ChatFormat(tokenizer).prompt([Message("user", "hello there")])


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal; nothing on the ranks that do not speak."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    for shown in (True, False):
        with progress.items_progress("answers", 4, shown) as report:
            report(1)
            report(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["answers 25.0%", "answers 75.0%"]
    assert all(line.endswith(" a second") for line in lines)
