"""metrics.jsonl: every line is JSON, and a resumed run tells no step twice."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from megallama.runtime.metrics import Metrics, memory, read_metrics, throughput


def write(folder, steps, resume_step=0, **more):
    with Metrics(folder, resume_step) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": 10.0 / step, **more})


def test_steps_are_on_disk_at_once(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write({"step": 1, "loss": 2.5, "mfu": None})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "mfu": None}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_full_disk_loses_no_record(small_disk):
    """They wait for space; a reader sees whole lines, and both turns are told once."""
    with Metrics(small_disk) as metrics:
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * shutil.disk_usage(small_disk).free)
        told = [metrics.write({"step": step, "loss": 1.0, "note": "x" * 500}) for step in range(1, 40)]
        begun = [line for line in told if line]
        assert begun == ["metrics.jsonl cannot be written, records wait in memory: No space left on device"]
        assert len(read_metrics(small_disk)) < 39
        filler.unlink()
        assert metrics.write({"step": 40}) == "metrics.jsonl is written again, nothing is missing in it"
        assert metrics.write({"step": 41}) is None
        assert [record["step"] for record in read_metrics(small_disk)] == list(range(1, 42))


def test_what_json_cannot_say_is_null(tmp_path):
    write(tmp_path, [1], grad_norm=math.nan, lr=math.inf, note="skipped")
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"step": 1, "loss": 10.0, "grad_norm": None, "lr": None, "note": "skipped"}


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    write(tmp_path, range(6, 11), resume_step=5)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_a_broken_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a JSON object with a step"):
        read_metrics(tmp_path)


def test_throughput_by_hand():
    speed = throughput(tokens=4_000_000, seconds=2.0, flops_per_token=4e10, devices=256, peak_tflops=625.0)
    assert speed == {"step_seconds": 2.0, "tokens_per_second": 2e6, "tflops_per_device": 312.5, "mfu": 0.5}
    assert throughput(1, 1.0, 1.0, 1, None)["mfu"] is None


def test_memory_counts_what_the_process_has_held():
    before = memory(torch.device("cpu"))
    held = torch.ones(256 * 2**20, dtype=torch.uint8)
    assert 0 < before < 2**40 and memory(torch.device("cpu")) >= before
    assert memory(torch.device("cpu")) >= held.numel()
