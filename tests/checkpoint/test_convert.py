"""tools/convert_checkpoint.py as users run it: what goes along, what it refuses, how much memory it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from weights import GQA, RandomSource, assert_same

from megallama.checkpoint.formats import HFSource, StoreSource, open_megatron, open_meta, write_hf, write_megatron
from megallama.checkpoint.formats import convert as conversion
from megallama.config import ModelConfig
from megallama.data.tokenizer import wrap_tokenizer
from megallama.model.canonical import FINAL_NORM, canonical_shapes
from megallama.parallel.pieces import Rect
from megallama.train import prove

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
SUMMARY = re.compile(
    r"(?P<tensors>[\d,]+) tensors, (?P<bytes>[\d,]+) bytes in (?P<files>\d+) files, [\d.]+ s; "
    r"peak memory (?P<peak>[\d,]+) MiB \((?P<start>[\d,]+) MiB at the start\), largest tensor (?P<largest>[\d.,]+) MiB"
)


class Ran(NamedTuple):
    """A run in this process."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *map(str, arguments)])
        code: Any = 0
        try:
            tool.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what the interpreter prints at the end
            code, err = 1, f"{err}{code}\n"
        return Ran(code, out, err)

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder with generation settings and what looks like a tokenizer of 40 ids."""
    folder = tmp_path / "hf"
    write_hf(RandomSource(GQA), folder)
    words = {f"w{n}": n for n in range(38)} | {"<s>": 38, "</s>": 39}
    content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    content |= {"model": model, "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [39, 7], "temperature": 0.5}))
    return folder


TENSORS = RandomSource(GQA).tensors


def test_help_teaches() -> None:
    result = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "python tools/convert_checkpoint.py --from hf --to megallama" in result.stdout
    assert "--megatron-order {core,local,legacy,epfl}" in result.stdout


def test_once_round(run: Callable[..., Ran], hf: Path, tmp_path: Path) -> None:
    """hf -> meta -> megatron -> megallama -> hf, each step proved; the tokenizer and the settings go along."""
    pytest.importorskip("transformers", reason="needs pip install megallama[hf]")
    steps: list[tuple[str, str, list[str], str]] = [
        ("hf", "meta", ["--tp", "8"], "SRC in transformers, DST in megallama"),
        ("meta", "megatron", ["--tp", "2", "--pp", "2", "--megatron-order", "epfl"], "SRC in megallama, DST in megal"),
        ("epfl", "megallama", ["--tp", "2"], "SRC in megallama, DST in megallama"),
        ("megallama", "hf", ["--max-shard-size", "20KB"], "SRC in megallama, DST in transformers"),
    ]
    folder = hf
    for n, (source, target, options, where) in enumerate(steps):
        ran = run("--from", source, "--to", target, folder, tmp_path / str(n), "--prove", *options)
        assert ran.code == 0, ran.err
        found = SUMMARY.search(ran.out)
        assert found is not None and found["tensors"] == "39"
        assert int(found["bytes"].replace(",", "")) >= sum(t.nbytes for t in TENSORS.values())
        assert re.search(rf"proved: largest logit difference \S+, largest logit \S+, bound \S+; {where}", ran.out)
        folder = tmp_path / str(n)
        assert (folder / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert_same(open_meta(tmp_path / "0"), TENSORS)
    assert_same(open_megatron(tmp_path / "1", True), TENSORS)
    assert_same(StoreSource(tmp_path / "2"), TENSORS)
    assert_same(HFSource(folder), TENSORS)
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [39, 7], "temperature": 0.5}
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (38, [39, 7], 40)


def test_precision(run: Callable[..., Ran], hf: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs pip install megallama[hf]")
    ran = run("--from", "hf", "--to", "hf", hf, tmp_path / "out", "--dtype", "bfloat16", "--prove")
    assert ran.code == 0 and "SRC in transformers, DST in transformers" in ran.out
    assert_same(HFSource(tmp_path / "out"), {name: t.bfloat16() for name, t in TENSORS.items()})


def test_another_tokenizer(run: Callable[..., Ran], hf: Path, tmp_path: Path) -> None:
    """A file that its trainer named goes along under the name that others look for, and nothing beside it does."""
    pytest.importorskip("tokenizers", reason="needs pip install megallama[hf]")
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text("{}")
    for name, expected in (("own.model", "tokenizer.model"), ("own.json", "tokenizer.json")):
        wrap_tokenizer(hf, other / name)
        ran = run("--from", "hf", "--to", "meta", hf, tmp_path / expected, "--tokenizer", other / name)
        assert ran.code == 0, ran.err
        assert (tmp_path / expected / expected).read_bytes() == (other / name).read_bytes()
        found = {path.name for path in (tmp_path / expected).iterdir()}
        assert found == {expected, "params.json", "consolidated.00.pth"}


@pytest.mark.parametrize("target", ["megallama", "hf", "meta", "megatron"])
def test_what_is_no_tokenizer(run: Callable[..., Ran], hf: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("tokenizers", reason="needs pip install megallama[hf]")
    (tmp_path / "empty").mkdir()
    big = json.loads((hf / "tokenizer.json").read_text())
    big["model"]["vocab"]["one more"] = 40
    (tmp_path / "big.json").write_text(json.dumps(big))
    for path, message in (
        (hf / "config.json", r"config\.json: no tokenizer\.json of the Hugging Face tokenizers library"),
        (tmp_path / "none", "none: no such tokenizer"),
        (tmp_path / "empty", "--tokenizer .*empty holds neither tokenizer.json nor tokenizer.model"),
        (tmp_path / "big.json", r"big\.json has 41 ids, but the model's vocab_size is 40"),
    ):
        ran = run("--from", "hf", "--to", target, hf, tmp_path / "out", "--tokenizer", path)
        (line,) = ran.err.strip().splitlines()
        assert ran.code == 1 and re.match(f"convert_checkpoint: error: .*{message}", line), line
        assert not (tmp_path / "out").exists()


def test_vocabulary_that_a_checkpoint_does_not_say(run: Callable[..., Ran], tmp_path: Path) -> None:
    import argparse

    write_megatron(RandomSource(GQA), tmp_path / "in", (1, 1, 1))
    path = tmp_path / "in" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    del content["args"].vocab_size, content["args"].true_vocab_size
    torch.save(content, path)
    ran = run("--from", "megatron", "--to", "hf", tmp_path / "in", tmp_path / "a")
    assert ran.code == 0 and "note: " in ran.err and "all 128 rows are kept" in ran.err
    assert HFSource(tmp_path / "a").model.vocab_size == 128
    ran = run("--from", "megatron", "--to", "hf", tmp_path / "in", tmp_path / "b", "--vocab-size", 40)
    assert ran.code == 0 and not ran.err
    assert_same(HFSource(tmp_path / "b"), TENSORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "hf", "--pp", "2"], "--pp means nothing with --to hf, only with megatron, megallama"),
        (["--to", "megallama", "--max-shard-size", "5GB"], "--max-shard-size means nothing with --to megallama"),
        (["--to", "megatron", "--vocab-size", "4"], "--vocab-size is for --from megatron and epfl; hf says its own"),
        (["--to", "megatron", "--tp", "0"], "argument --tp: '0' must be a number from 1 to 4096"),
        (["--to", "hf", "--max-shard-size", "5XB"], "'5XB' is no size; write it as 5GB, 500MB or 2GiB"),
        (["--to", "epfl"], "invalid choice: 'epfl'"),
    ],
)
def test_options_that_mean_nothing(
    run: Callable[..., Ran], tmp_path: Path, hf: Path, options: list[str], message: str
) -> None:
    ran = run("--from", "hf", *options, hf, tmp_path / "out")
    assert ran.code == 2 and message in ran.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "hf", "--to", "megatron", "--tp", "3"], "num_attention_heads=16 is not divisible by --tp 3"),
        (["--from", "hf", "--to", "megatron", "--pp", "3"], "num_hidden_layers=4 cannot be cut into --pp 3"),
        (["--from", "hf", "--to", "meta", "--tp", "16"], "num_key_value_heads=8 cannot be cut into 16 shards"),
        (
            ["--from", "hf", "--to", "megallama", "--tp", "4096", "--pp", "4096"],
            "--tp 4096 x --pp 4096 is more than the model's 16 attention heads and 4 layers",
        ),
        (["--from", "meta", "--to", "hf"], r"holds no consolidated\.00\.pth; it is not a folder of Meta's"),
        (["--from", "megatron", "--to", "hf"], "it is not a Megatron checkpoint"),
        (["--from", "megallama", "--to", "hf"], r"holds no manifest\.json and no step_… folder"),
    ],
)
def test_one_line_for_what_is_wrong(
    run: Callable[..., Ran], tmp_path: Path, hf: Path, options: list[str], message: str
) -> None:
    ran = run(*options, hf, tmp_path / "out")
    (line,) = ran.err.strip().splitlines()
    assert ran.code == 1 and re.match(f"convert_checkpoint: error: .*{message}", line), line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_nothing_is_replaced(run: Callable[..., Ran], tmp_path: Path, hf: Path) -> None:
    """Not even an earlier export, and not the source itself."""
    files = {path.name: path.read_bytes() for path in hf.iterdir()}
    for target in ("hf", "meta", "megatron", "megallama"):
        ran = run("--from", "hf", "--to", target, hf, hf)
        assert ran.code == 1 and f"{hf} exists already; name a new folder, or an empty one" in ran.err
    assert {path.name: path.read_bytes() for path in hf.iterdir()} == files
    (tmp_path / "out").mkdir()
    assert run("--from", "hf", "--to", "meta", hf, tmp_path / "out").code == 0


@pytest.mark.parametrize("way", ["damage", "signal", "interrupt", "full"])
@pytest.mark.parametrize("target", ["hf", "meta", "megatron", "megallama"])
def test_nothing_is_left_behind(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path, target: str, way: str
) -> None:
    def stop() -> None:
        if way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if way == "interrupt":
            raise KeyboardInterrupt
        raise ValueError("layer 3 is damaged") if way == "damage" else OSError(28, "No space left on device")

    class Stopping(conversion.Watched):
        def read(self, name: str, rect: Rect, out: Tensor) -> None:
            if name == FINAL_NORM:
                stop()
            super().read(name, rect, out)

    monkeypatch.setattr(conversion, "Watched", Stopping)
    ran = run("--from", "hf", "--to", target, hf, tmp_path / "out")
    expected = {"damage": (1, "layer 3 is damaged"), "signal": (143, ""), "full": (1, "No space left on device")}
    code, text = expected.get(way, (130, "stopped; nothing was left behind"))
    assert ran.code == code and text in ran.err and not ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_current_directory(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in ("hf", "meta", "megatron", "megallama"):
        ran = run("--from", "hf", "--to", target, hf, ".")
        assert ran.code == 1 and f"{tmp_path / 'here'} is the current directory, which" in ran.err
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != hf) == ["here", "hf"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("cannot allocate\nmany lines")])
def test_no_memory_is_one_line(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path, error: Exception
) -> None:
    class Starving(conversion.Watched):
        def read(self, name: str, rect: Rect, out: Tensor) -> None:
            raise error

    monkeypatch.setattr(conversion, "Watched", Starving)
    ran = run("--from", "hf", "--to", "meta", hf, tmp_path / "out")
    told = "MemoryError" if isinstance(error, MemoryError) else "cannot allocate"
    assert ran.code == 1 and ran.err == f"convert_checkpoint: error: {told}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_is_told_before(run: Callable[..., Ran], tmp_path: Path, hf: Path) -> None:
    """Which checkpoint is taken where the newest is damaged, and what a killed conversion has left."""
    for step in (3, 20):
        assert run("--from", "hf", "--to", "megallama", hf, tmp_path / "run" / f"step_{step:08d}").code == 0
    manifest = tmp_path / "run" / "step_00000020" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    ran = run("--from", "megallama", "--to", "hf", tmp_path / "run", tmp_path / "out")
    skipped, left = ran.err.strip().splitlines()
    assert re.match(r"note: \S+/step_00000020 is not a checkpoint: .*; taking the older step_00000003", skipped)
    assert left.startswith(f"note: {tmp_path / '.out.0123abcd.tmp'} is another attempt at this DST; unless it is still")
    assert ran.code == 0
    assert_same(HFSource(tmp_path / "out"), TENSORS)


def test_a_full_disk_is_seen_before(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: Usage(1000))
    ran = run("--from", "hf", "--to", "meta", hf, tmp_path / "out")
    assert ran.code == 1 and re.search(r"has 0\.0 GB free, out needs 0\.0 GB; free some", ran.err)


def test_a_proof_that_does_not_fit(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path
) -> None:
    monkeypatch.setattr(prove, "OVERHEAD", 1e9)
    ran = run("--from", "hf", "--to", "meta", hf, tmp_path / "out", "--prove")
    assert ran.code == 1 and "--prove runs each side in fp32, which needs" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_proof_that_fails(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hf: Path) -> None:
    monkeypatch.setattr(prove, "BOUND", 0.0)
    ran = run("--from", "hf", "--to", "meta", hf, tmp_path / "out", "--prove")
    assert ran.code == 1 and "DST does not compute what SRC does: largest logit difference" in ran.err


class Streamed:
    """Weights made when they are asked for: a large model without its memory."""

    def __init__(self, model: ModelConfig):
        self.folder, self.model, self.shapes = Path("streamed"), model, canonical_shapes(model)
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        out.copy_(torch.arange(rect.c0, rect.c1) % 251 - 125)
        out += (torch.arange(rect.r0, rect.r1) % 13 + len(name))[:, None]


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 0.9 GiB; every conversion takes less than twice its largest tensor and the windows of a file."""
    model = ModelConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    write_hf(Streamed(model), tmp_path / "hf")
    folder, form = tmp_path / "hf", "hf"
    steps = (("megallama", "--tp", "2"), ("meta", "--tp", "2"), ("megatron", "--tp", "2", "--pp", "2"), ("hf",))
    for n, (target, *options) in enumerate(steps):
        command = [sys.executable, TOOL, "--from", form, "--to", target, folder, tmp_path / str(n), *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr
        found = SUMMARY.search(result.stdout)
        assert found is not None
        peak, start, largest = (float(found[key].replace(",", "")) for key in ("peak", "start", "largest"))
        assert largest == 125.0
        assert peak - start < 2 * largest + 130, f"{form} -> {target}: {result.stdout}"
        if form != "hf":
            subprocess.run(["rm", "-r", folder], check=True)
        folder, form = tmp_path / str(n), target
    for path in sorted((tmp_path / "hf").glob("*.safetensors")):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert replace(HFSource(folder).model, max_position_embeddings=4096) == model
