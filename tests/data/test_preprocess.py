"""Preprocessing as users run it: the same bytes for any number of processes, after a kill, and under mpirun."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import ROOT, TOOL_ENVIRONMENT, sentences

from megallama.data import IndexedDataset, load_tokenizer
from megallama.data.preprocess import Recipe, encode_part, finished, holding, join, plan, prepare

Tool = Callable[..., subprocess.CompletedProcess[str]]
TEXTS = sentences(500)


def write_jsonl(path: Path, texts: list[str], padding: int = 0) -> None:
    """`padding` bytes of an unused field in each line: more parts without more tokens."""
    path.write_text("".join(json.dumps({"text": text, "unused": "x" * padding}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 5 MB that is cut into several parts."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", TEXTS[:300], 12_000)
    write_jsonl(folder / "b.jsonl", TEXTS[300:400])
    for n, text in enumerate(TEXTS[400:]):
        (folder / f"c{n:03d}.txt").write_text(text)
    return folder


@pytest.fixture
def arguments(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> list[object]:
    return ["--input", corpus, "--tokenizer", tokenizer_path, "--output-prefix", tmp_path / "out"]


def files(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def test_contents_and_every_number_of_workers(arguments, tool: Tool, tokenizer_path: Path, tmp_path: Path):
    made = {}
    for workers in (1, 3):
        result = tool("preprocess_data", *arguments, "--workers", workers)
        assert result.returncode == 0, result.stderr
        assert "500 documents" in result.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]
        made[workers] = files(tmp_path / "out")
        (tmp_path / "out.json").unlink()  # or the next run would find its work done
    assert made[1] == made[3]
    tokenizer = load_tokenizer(tokenizer_path)
    dataset = IndexedDataset(tmp_path / "out")
    dataset.validate()
    assert dataset.dtype == "uint16"
    assert [dataset.document(k).tolist() for k in range(len(dataset))] == [
        [*ids, tokenizer.eos] for ids in tokenizer.encode_batch(TEXTS)
    ]


def test_finished_work_is_not_done_again_unless_something_changed(arguments, tool: Tool, tmp_path: Path):
    assert tool("preprocess_data", *arguments, "--workers", 2).returncode == 0
    stamp, before = (tmp_path / "out.bin").stat().st_mtime_ns, files(tmp_path / "out")
    assert "500 documents" in tool("preprocess_data", *arguments, "--workers", 1).stdout
    assert (tmp_path / "out.bin").stat().st_mtime_ns == stamp
    changed = tool("preprocess_data", *arguments, "--workers", 2, "--no-append-eod", "--prepend-bos")
    assert changed.returncode == 0, changed.stderr
    assert len(files(tmp_path / "out")[0]) == len(before[0]) and files(tmp_path / "out")[0] != before[0]
    assert IndexedDataset(tmp_path / "out").document(0)[0] == 1


def test_a_killed_run_goes_on_where_it_was(tokenizer_path: Path, tmp_path: Path, tool: Tool):
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcdefgh ,.12\n", k=3000)) for _ in range(1100)]  # 3.4 MB, seconds of work
    write_jsonl(tmp_path / "in.jsonl", lines)
    arguments = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer_path, "--workers", 1, "--output-prefix"]
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", *arguments, tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), env=TOOL_ENVIRONMENT, stderr=subprocess.DEVNULL)
    first = tmp_path / "out.parts" / "000000.json"
    deadline = time.monotonic() + 60
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the first part never came"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()
    resumed = tool("preprocess_data", *arguments, tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr
    assert "parts are done already" in resumed.stderr
    fresh = tool("preprocess_data", *arguments, tmp_path / "fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert not (tmp_path / "out.parts").exists()


def test_finished_parts_stay_and_damaged_or_foreign_ones_go(corpus: Path, tokenizer_path: Path, tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_path)
    job = plan([str(corpus)], Recipe(str(tokenizer_path)), str(tmp_path / "out"))
    everything = list(range(len(job.parts)))
    assert len(everything) > 3
    missing, note = prepare(job)
    assert (missing, note) == (everything, "")
    seen = [0, 0]

    def report(size: int, tokens: int) -> None:
        seen[0] += size
        seen[1] += tokens

    for n in everything:
        encode_part(job, n, tokenizer, report)
    assert seen[0] == job.size
    assert prepare(job)[0] == []
    os.truncate(job.part(1) + ".bin", 5)
    os.unlink(job.part(2) + ".json")
    assert prepare(job) == ([1, 2], f"going on: {len(everything) - 2} of {len(everything)} parts are done already")
    other = plan([str(corpus)], Recipe(str(tokenizer_path), append_eod=False), str(tmp_path / "out"))
    assert prepare(other) == (everything, f"{job.folder} was begun with other settings (append_eod): starting anew")
    assert sorted(path.name for path in job.folder.iterdir()) == ["settings.json"]
    for n in everything:
        encode_part(other, n, tokenizer, report)
    summary = join(other, 0.0)
    assert summary.documents == 500 and finished(other) == summary and finished(job) is None


def test_two_runs_do_not_write_the_same_parts(tmp_path: Path):
    alone = holding(tmp_path, exclusive=True, patience=0.2)
    with holding(tmp_path), holding(tmp_path), pytest.raises(ValueError, match="in use by another run"), alone:
        pass
    with holding(tmp_path, exclusive=True, patience=0.0):
        pass


@pytest.mark.mpi
def test_under_mpirun(arguments, tool: Tool, tmp_path: Path):
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        pytest.skip("no mpirun on this machine")
    assert tool("preprocess_data", *arguments, "--workers", 1).returncode == 0
    alone = files(tmp_path / "out")
    for name in ("out.bin", "out.idx", "out.json"):
        (tmp_path / name).unlink()
    launcher = [mpirun, "-n", "2"]
    result = tool("preprocess_data", *arguments, "--workers", 1, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("500 documents") == 1
    assert files(tmp_path / "out") == alone
    bad = tool("preprocess_data", *arguments, "--json-keys", "body", "--max-bad-fraction", 0, launcher=launcher)
    assert bad.returncode != 0 and bad.stderr.count("preprocess_data: error:") == 1


def test_bad_records_are_quarantined_with_their_line_numbers(tokenizer_path: Path, tmp_path: Path, tool: Tool):
    """Over several slices of a file, and over files that share a part."""
    good = json.dumps({"text": "fine", "unused": "x" * 9_000})
    for name in ("a", "b"):
        lines = [good] * 300
        lines[2], lines[299], lines[10] = "{broken", '{"text": "\\ud800"}', json.dumps({"text": ""})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    arguments = ["--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--tokenizer", tokenizer_path, "--workers", 2]
    arguments += ["--output-prefix", tmp_path / "out"]
    refused = tool("preprocess_data", *arguments, "--max-bad-fraction", 0.001)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
    assert "4 of 598 records are bad" in line and "a.jsonl line 3: not JSON" in line
    assert not (tmp_path / "out.idx").exists() and not (tmp_path / "out.bin").exists()
    entries = [json.loads(line) for line in (tmp_path / "out.bad.jsonl").read_text().splitlines()]
    assert [(Path(e["file"]).name, e["line"]) for e in entries] == [("a.jsonl", 3), ("a.jsonl", 300)] + [
        ("b.jsonl", 3), ("b.jsonl", 300)
    ]  # fmt: skip
    assert entries[0]["text"] == "{broken\n" and "not UTF-8" in entries[1]["problem"]
    allowed = tool("preprocess_data", *arguments, "--max-bad-fraction", 0.01)
    assert allowed.returncode == 0, allowed.stderr
    assert "594 documents" in allowed.stdout and "4 bad records" in allowed.stdout
    assert "2 empty records" in allowed.stdout and "parts are done already" in allowed.stderr


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The tool failed with one clear line."""
    assert result.returncode != 0 and result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("preprocess_data: error:"), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_errors_are_one_line_and_leave_nothing(tokenizer_path: Path, tmp_path: Path, tool: Tool):
    (tmp_path / "in.txt").write_text("hello")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    write_jsonl(tmp_path / "other_key.jsonl", TEXTS[:1] * 1200)
    (tmp_path / "a_file").touch()

    def attempt(*, source: str = "in.txt", tokenizer: object = tokenizer_path, out: str = "out", more: tuple = ()):
        shutil.rmtree(tmp_path / "out.parts", ignore_errors=True)
        paths = ["--input", tmp_path / source, "--tokenizer", tokenizer, "--output-prefix", tmp_path / out]
        return tool("preprocess_data", *paths, "--workers", 1, *more)

    one_line(attempt(source="gone.jsonl"), "gone.jsonl: no such file")
    one_line(attempt(tokenizer=tmp_path / "gone.model"), "gone.model: no such tokenizer")
    one_line(attempt(tokenizer=tmp_path / "in.txt"), "neither a SentencePiece model")
    one_line(attempt(out="a_file/out"), "cannot be written", "--output-prefix")
    one_line(attempt(more=("--workers", 0)), "--workers 0 must be from 1")
    one_line(attempt(more=("--max-document-bytes", 3, "--max-bad-fraction", 0)), "longer than the limit of 3 bytes")
    one_line(
        attempt(source="other_key.jsonl", more=("--json-keys", "body")), "1000 of the first 1000", "'body' is missing"
    )
    one_line(attempt(source="blank.jsonl", out="blank"), "no document", "--json-keys")
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"out.bin", "out.idx", "out.json", "blank.bin", "blank.idx"}
