"""The other data tools, as users run them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from documents import sentences

from megallama.data import IndexedWriter, Mixture, load_tokenizer, open_mixture

Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", ["train_tokenizer", "preprocess_data", "inspect_data", "make_quickstart_corpus"])
def test_help_teaches(tool: Tool, name: str):
    result = tool(name, "--help")
    assert result.returncode == 0 and f"python tools/{name}.py" in result.stdout


@pytest.mark.parametrize("size", [262, 270, 300])
def test_small_vocabularies(tool: Tool, tmp_path: Path, size: int):
    (tmp_path / "in.txt").write_text("\n".join(sentences(100)))
    result = tool("train_tokenizer", "--input", tmp_path / "in.txt", "--vocab-size", size, "--output", tmp_path / "t")
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("1984 漢字 é\n")) == "1984 漢字 é\n"


def test_train_tokenizer_errors(tool: Tool, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(100)))
    (tmp_path / "a_file").touch()

    def error(*arguments: object, source: str = "in.jsonl", out: str = "t") -> str:
        result = tool("train_tokenizer", "--input", tmp_path / source, "--output", tmp_path / out, *arguments)
        assert result.returncode != 0 and result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "in.jsonl"]
        return line

    said = error("--vocab-size", 32000)
    assert "the largest possible is" in said
    largest = int(said.split("the largest possible is ")[1].split(";")[0])
    assert "too small" in error("--vocab-size", 100)
    assert "no such file" in error("--vocab-size", 300, source="gone.txt")
    assert "no text" in error("--vocab-size", 300, "--json-keys", "body")
    assert "--vocab-size" in error()
    assert "a_file" in error("--vocab-size", 300, out="a_file/t")
    exact = tool(
        "train_tokenizer", "--input", tmp_path / "in.jsonl", "--vocab-size", largest, "--output", tmp_path / "t"
    )
    assert exact.returncode == 0, exact.stderr


def test_wrap(tool: Tool, tokenizer_path: Path, tmp_path: Path):
    assert tool("train_tokenizer", "--wrap", tokenizer_path, "--output", tmp_path / "w").returncode == 0
    assert (tmp_path / "w.model").read_bytes() == tokenizer_path.read_bytes()


def test_quickstart_corpus_is_real_text_and_always_the_same(tool: Tool, tmp_path: Path):
    for name in ("one", "two"):
        assert tool("make_quickstart_corpus", "--output", tmp_path / name).returncode == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    contents = [(tmp_path / "one" / name).read_bytes() for name in files]
    assert contents == [(tmp_path / "two" / name).read_bytes() for name in files]
    texts = [json.loads(line)["text"] for content in contents for line in content.splitlines()]
    assert len(files) >= 2 and 5e6 < sum(map(len, texts)) < 16e6
    assert len(set(texts)) == len(texts) > 300
    assert any("class ArgumentParser" in text for text in texts)


@pytest.fixture
def prefix(tokenizer_path: Path, tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(tokenizer_path)
    with IndexedWriter(tmp_path / "corpus", "uint16") as writer:
        for ids in tokenizer.encode_batch(sentences(200)):
            writer.add_document([*ids, 2])
    return tmp_path / "corpus"


def test_inspect_a_corpus(tool: Tool, prefix: Path, tokenizer_path: Path):
    shown = tool("inspect_data", prefix, "--validate").stdout
    assert "documents    200" in shown and "dtype        uint16" in shown and "has been checked" in shown
    document = tool("inspect_data", prefix, "--document", 7, "--tokenizer", tokenizer_path).stdout
    assert document.startswith("document 7:") and sentences(200)[7] in document
    for arguments, words in (
        ((prefix, "--document", 200), "documents 0 to 199"),
        ((f"{prefix}x",), "no such file"),
        (("--run", prefix.parent, "--step", 1), "config.yaml: no such file"),
    ):
        result = tool("inspect_data", *arguments)
        assert result.returncode != 0 and len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert tool("inspect_data").returncode != 0


def run_folder(prefix: Path, ramp: dict[str, int] | None, consumed: list[int]) -> tuple[Path, Mixture]:
    """A run as training leaves it, with `consumed` samples after steps 1, 2, …"""
    run = prefix.parent / "run"
    run.mkdir()
    sources = [{"prefix": str(prefix), "weight": 1.0}]
    data = {"sources": sources, "split": 0.1, "seq_length": 16, "mask_documents": False}
    train = {"seed": 11, "global_batch_size": 8, "ramp": ramp, "steps": 100}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data, "train": train}))
    records = [{"step": n, "loss": 1.0, "consumed_samples": samples} for n, samples in enumerate(consumed, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": ')
    return run, open_mixture([(str(prefix), 1.0)], 16, 0.1, "train", 11)


def test_inspect_a_step_of_a_run(tool: Tool, prefix: Path, tokenizer_path: Path):
    run, mixture = run_folder(prefix, None, [4, 8, 14])  # metrics win: they say what has really been used
    shown = tool("inspect_data", "--run", run, "--step", 3, "--tokenizer", tokenizer_path).stdout
    assert shown.startswith("step 3: samples 8 to 13\n")
    tokenizer = load_tokenizer(tokenizer_path)
    for i in range(8, 14):
        ((lo, hi),) = mixture.locate(i).ranges
        (line,) = [line for line in shown.splitlines() if line.startswith(f"sample {i}:")]
        assert str(mixture.locate(i).documents[0]) in line and f"{lo:,}–{hi - 1:,}" in line
        text = tokenizer.decode(mixture.sample(i).tolist())[:120]
        assert json.dumps(text, ensure_ascii=False) in shown
    planned = tool("inspect_data", "--run", run, "--step", 10).stdout
    assert planned.startswith("step 10: samples 72 to 79\n")
    assert "steps 1 to 100" in tool("inspect_data", "--run", run, "--step", 101).stderr


def test_inspect_a_step_of_a_ramp(tool: Tool, prefix: Path):
    run, _ = run_folder(prefix, {"start": 2, "increment": 2, "samples": 24}, [])
    # 8 samples at each of 2, 4 and 6 a step, rounded up to whole steps: 4, 2 and 2 steps.
    assert "samples 8 to 11\n" in tool("inspect_data", "--run", run, "--step", 5).stdout
    assert "samples 28 to 35\n" in tool("inspect_data", "--run", run, "--step", 9).stdout
