"""Pretraining as users start it: from the command line to a run's folder, and what happens when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama import cli
from megallama.checkpoint import checkpoint_folders, checkpointer
from megallama.config import load
from megallama.data import IndexedWriter
from megallama.data.ramp import BatchPlan
from megallama.runtime.lock import sole_owner
from megallama.runtime.metrics import read_metrics
from megallama.train.loop import Loop

VOCAB = 97
CLOCK = {"step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"}
KEYS = {"step", "loss", "lr", "grad_norm", "consumed_samples", "consumed_tokens"} | CLOCK
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of a noisy Markov chain."""
    prefix = tmp_path_factory.mktemp("corpus") / "data"
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            ids = [int(random.integers(VOCAB))]
            for noise in random.random(int(random.integers(20, 90))):
                ids.append((3 * ids[-1] + 7) % VOCAB if noise < 0.9 else int(noise * 1e4) % VOCAB)
            writer.add_document(ids)
    return prefix


@pytest.fixture
def arguments(corpus: Path, tmp_path: Path) -> list[str]:
    """The command line of a run of 6 steps; what is appended wins."""
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
         vocab_size: {VOCAB}, max_position_embeddings: 16}}
data: {{sources: [{{prefix: {corpus}}}], seq_length: 16, split: 0.1}}
train: {{steps: 6, micro_batch_size: 2, global_batch_size: 8, dtype: float64, valid_interval: 4, valid_steps: 2}}
optim: {{lr: 5.0e-3, warmup_steps: 1}}
checkpoint: {{interval: 0}}
output_dir: {tmp_path / "run"}
""")
    return ["pretrain", "--config", str(config)]


def train(arguments: Sequence[str], *more: str) -> list[dict]:
    """Run in this process; the metrics."""
    assert cli.main([*arguments, *more]) == 0
    return read_metrics(load([*arguments[1:], *more]).output_dir)


def numbers(records: list[dict]) -> list[dict]:
    """Records without what a clock or the memory decides."""
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def test_a_run_leaves_its_folder(arguments: list[str], tmp_path: Path) -> None:
    records = train(arguments)
    run = tmp_path / "run"
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(set(record) >= KEYS for record in records)
    assert [record["step"] for record in records if "valid_loss" in record] == [4, 6]
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]
    assert records[-1]["consumed_tokens"] == 6 * 8 * 16
    assert records[0]["mfu"] is None
    assert load(["--config", str(run / "config.yaml")]) == load(arguments[1:])
    assert list((run / "tensorboard").iterdir())
    assert [folder.name for folder in checkpoint_folders(run / "checkpoints")] == ["step_00000006"]


def test_a_stopped_run_goes_on_bitwise(arguments: list[str], tmp_path: Path) -> None:
    whole = train(arguments, "--output_dir", str(tmp_path / "whole"))
    first = train(arguments, "--train.stop_after", "3")
    assert [record["step"] for record in first] == [1, 2, 3]
    second = train(arguments)

    def plain(records: list[dict]) -> list[dict]:
        return [{k: v for k, v in record.items() if k != "valid_loss"} for record in numbers(records)]

    assert plain(second) == plain(whole)
    assert second[-1]["valid_loss"] == whole[-1]["valid_loss"]


def test_micro_batch_size_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    two = train(arguments)
    one = train(arguments, "--train.micro_batch_size", "1", "--output_dir", str(tmp_path / "one"))
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-10)


def test_a_ramp_grows_the_batch(arguments: list[str]) -> None:
    ramp = ["--train.ramp.start", "2", "--train.ramp.increment", "2", "--train.ramp.samples", "12"]
    plan = BatchPlan(8, 2, 2, 12)
    records = train(arguments, *ramp)
    assert [record["consumed_samples"] for record in records] == [sum(plan(step)) for step in range(1, 7)]
    assert records[0]["consumed_samples"] == 2


def test_masked_documents_are_another_task(arguments: list[str], tmp_path: Path) -> None:
    masked = train(arguments, "--data.mask_documents", "true", "--output_dir", str(tmp_path / "masked"))
    plain = train(arguments)
    assert masked[0]["loss"] != plain[0]["loss"]
    assert masked[-1]["loss"] < 0.95 * masked[0]["loss"]


def test_profiler_traces(arguments: list[str], tmp_path: Path) -> None:
    window = ["--train.profile.start", "2", "--train.profile.stop", "4"]
    train(arguments, *window, "--train.stop_after", "5")
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    updates = [event for event in events if event.get("name") == "aten::_fused_adamw_"]
    assert len(updates) == 2  # steps 2 and 3, one bucket
    written = trace.stat().st_mtime_ns
    train(arguments, *window)  # resumed behind the window: the trace stays
    assert trace.stat().st_mtime_ns == written


def test_a_second_run_on_one_folder_is_refused(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first, in a process of its own, is named, and goes on untouched; once it is killed, the folder is free."""
    long = [*arguments, "--train.steps", "100000", "--train.valid_interval", "0", "--checkpoint.interval", "5"]
    first = subprocess.Popen([sys.executable, "-m", "megallama", *long], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    run = tmp_path / "run"
    wait_for(lambda: len(checkpoint_folders(run / "checkpoints")) > 0, first)
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--optim.lr", "1"])
    error = capfd.readouterr().err
    assert f"output_dir={run} is in use by another run: process {first.pid} on {socket.gethostname()} since 20" in error
    assert "set another output_dir" in error
    assert load(["--config", str(run / "config.yaml")]).optim.lr == 5e-3
    wait_for(lambda: checkpoint_folders(run / "checkpoints")[0].name > "step_00000010", first)
    first.kill()
    first.wait()
    (newest, *_) = checkpoint_folders(run / "checkpoints")
    assert train(long, "--train.stop_after", str(int(newest.name[5:]) + 1))


def test_a_full_disk_does_not_stop_a_run(
    arguments: list[str], small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real small file system with room for one checkpoint: step 1 has one, 2 is missed and said so, and at the end,
    where the last one is missing, the run fails and can go on from the first."""
    arguments += ["--output_dir", str(small_disk), "--checkpoint.interval", "1", "--checkpoint.keep", "0"]
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--train.stop_after", "4"])
    assert end.value.code == 1
    output, error = capfd.readouterr()
    for step in (2, 3, 4):
        assert re.search(rf"no checkpoint of step {step}, the run goes on: .* MiB free, a checkpoint needs", output)
    assert "ValueError: the last checkpoint, of step 4, could not be written; once it can be" in error
    assert [record["step"] for record in read_metrics(small_disk)] == [1, 2, 3, 4]
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_refused_start_leaves_the_configuration(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(arguments, "--train.stop_after", "1")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--model.rope_theta", "5000"])
    assert "rope_theta is 10000.0 there, 5000.0 here" in capfd.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_an_export_that_could_not_be_is_refused_at_the_start(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--checkpoint.export_hf", str(tmp_path / "out")])
    assert "out holds thesis.txt, which is not from an earlier export" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_is_owned_until_the_last_save_has_ended(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a step, while a save in the background still writes."""
    run, free, write = tmp_path / "run", [], checkpointer.write_rectangles

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        try:
            with sole_owner(run):
                free.append(True)
        except ValueError:
            free.append(False)
        return write(*args)

    def fail(*args: Any) -> None:
        raise RuntimeError("a step fails")

    monkeypatch.setattr(checkpointer, "write_rectangles", slow)
    monkeypatch.setattr(Loop, "validate", fail)
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--checkpoint.interval", "1", "--train.valid_interval", "2", "--train.steps", "2"])
    assert free == [False]
    assert [folder.name for folder in checkpoint_folders(run / "checkpoints")] == ["step_00000001"]
    with sole_owner(run):
        pass


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


def test_hopeless_gradients_end_the_run(
    arguments: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A learning rate that blows the weights up: bad steps change nothing, and after three of them the run ends."""
    blown = ["--optim.lr", "1e200", "--optim.clip_grad", "0", "--train.max_bad_steps", "3", "--train.steps", "20"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, *blown])
    assert exit_.value.code == 1
    line = capfd.readouterr().err.strip()
    assert "3 consecutive steps had non-finite gradients" in line
    assert "\n" not in line
    records = read_metrics(tmp_path / "run")
    assert [("event" in record) for record in records][-3:] == [True, True, True]
    assert records[-1]["grad_norm"] is None


def test_an_abandoned_course_is_not_resumed_by_accident(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Starting anew, or from an older checkpoint, where a later one waits: the next restart would jump to that one."""
    train(arguments, "--checkpoint.interval", "2")
    for source in ("none", str(tmp_path / "run" / "checkpoints" / "step_00000002")):
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--checkpoint.load", source])
        error = capfd.readouterr().err
        assert "step_00000006" in error and "remove the later checkpoints" in error
    other = str(tmp_path / "other")
    begun = ["--output_dir", other, "--checkpoint.load", str(tmp_path / "run" / "checkpoints" / "step_00000004")]
    assert [record["step"] for record in train(arguments, *begun, "--train.stop_after", "5")] == [5]
    assert [record["step"] for record in train(arguments, *begun)] == [5, 6]  # its own checkpoint comes first


@pytest.mark.parametrize("stage", ["pretrain", "generate"])
def test_a_checkpoint_of_another_model_is_refused(
    stage: str, arguments: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Another number of heads or another rotary base leaves all shapes as they are."""
    train(arguments, "--train.stop_after", "2")
    wrong = ["--model.num_attention_heads", "8", "--model.num_key_value_heads", "4", "--model.rope_theta", "500"]
    tokenizer = []
    if stage == "generate":
        tokenizer = ["--data.tokenizer", str(make_tokenizer(tmp_path))]
    try:
        code = cli.main([stage, *arguments[1:], *wrong, *tokenizer])
    except SystemExit as stopped:  # told once the ranks have met
        code = stopped.code
    assert code in (1, 2)
    error = capfd.readouterr().err
    assert "num_attention_heads is 4 there, 8 here" in error
    assert "rope_theta is 10000.0 there, 500.0 here" in error


def make_tokenizer(folder: Path) -> Path:
    """A SentencePiece model of few ids."""
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 20)
    trainer = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
    command = [sys.executable, str(trainer), "--input", str(text), "--vocab-size", "290", "--output", str(folder / "t")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder / "t.model"


def damage(name: str, corpus: Path, folder: Path) -> Path:
    """A copy of the corpus with one fault."""
    index, data = corpus.with_suffix(".idx").read_bytes(), corpus.with_suffix(".bin").read_bytes()
    if name == "truncated index":
        index = index[:-9]
    elif name == "wrong magic":
        index = b"NOTANIDX" + index[8:]
    elif name == "absurd counts":
        index = index[:18] + (2**60).to_bytes(8, "little") + index[26:]
    elif name == "short data":
        data = data[:-100]
    elif name == "empty":
        with IndexedWriter(folder / "bad", np.uint16):
            pass
        return folder / "bad"
    (folder / "bad.idx").write_bytes(index)
    (folder / "bad.bin").write_bytes(data)
    return folder / "bad"


@pytest.mark.parametrize("fault", ["truncated index", "wrong magic", "absurd counts", "short data", "empty"])
def test_bad_data_is_one_line(
    fault: str, arguments: list[str], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = damage(fault, corpus, tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--data.sources", json.dumps([{"prefix": str(bad)}])])
    assert exit_.value.code == 1
    check_refusal(capfd.readouterr().err, tmp_path, str(bad))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.sources", "[]"], "data.sources is empty"),
        (["--model.vocab_size", "50"], "model.vocab_size=50"),
        (["--output_dir", "{tmp}/run.yaml/below"], "set output_dir"),
        (["--data.seq_length", "999999", "--model.max_position_embeddings", "999999"], "lower data.seq_length"),
        (["--checkpoint.load", "{tmp}/none"], "is not a checkpoint"),
        (["--checkpoint.load", "hf:{tmp}/none"], "is no folder of a run"),
    ],
)
def test_bad_settings_are_one_line(
    more: list[str], words: str, arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, *(text.format(tmp=tmp_path) for text in more)])
    assert exit_.value.code == 1
    check_refusal(capfd.readouterr().err, tmp_path, words)


def check_refusal(error: str, folder: Path, words: str) -> None:
    """One line of ours with the words, and no trained step."""
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("megallama: error on rank 0")
    assert words in error
    assert not (folder / "run" / "checkpoints").exists()
    assert not read_metrics(folder / "run") if (folder / "run" / "metrics.jsonl").exists() else True


def test_one_process_goes_on_with_what_four_began(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's command line, under torchrun, then alone: data, batch ramp, schedule and losses as in one go."""
    arguments += ["--train.ramp.start", "4", "--train.ramp.increment", "2", "--train.ramp.samples", "20"]
    alone = train(arguments, "--output_dir", str(tmp_path / "alone"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        "-m",
        "megallama",
        *arguments,
    ]
    command += ["--parallel.tp", "2", "--parallel.pp", "2", "--train.stop_after", "4"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    both = train(arguments)
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step_00000004'}" in capsys.readouterr().out
    for a, b in zip(alone, both, strict=True):
        assert (a["lr"], a["consumed_samples"]) == (b["lr"], b["consumed_samples"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
        assert a.get("valid_loss", 0) == pytest.approx(b.get("valid_loss", 0), rel=1e-10)
    assert alone[0]["consumed_samples"] == 4 < alone[-1]["consumed_samples"] - alone[-2]["consumed_samples"]


def test_a_signal_saves_and_leaves(arguments: list[str], tmp_path: Path) -> None:
    """SIGTERM, as from a scheduler that preempts the job: exit code 0, and the next start goes on from that step."""
    long = [*arguments, "--train.steps", "100000", "--train.valid_interval", "0"]
    process = subprocess.Popen([sys.executable, "-m", "megallama", *long], env=ENVIRONMENT, stdout=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"stopped by SIGTERM" in output
    last = read_metrics(metrics)[-1]["step"]
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run" / "checkpoints")] == [f"step_{last:08d}"]
    assert train(long, "--train.stop_after", str(last + 1))[-1]["step"] == last + 1
