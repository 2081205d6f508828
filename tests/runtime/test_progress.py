"""Progress as it reaches a log file, and as it stands on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

import megallama.runtime.progress
from megallama.runtime.progress import Progress, clock, scaled

RECORD = {"step": 0, "loss": 3.25, "lr": 3e-4, "grad_norm": 1.234, "consumed_tokens": 7, "tokens_per_second": 12345.6}
RECORD |= {"tflops_per_device": 42.1, "mfu": 0.412, "memory_bytes": 1.5 * 2**30, "reward_accuracy": 0.625}


def shown(terminal: bool, width: int = 80, steps: int = 7, record: dict = RECORD) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system=None)
    with Progress(total=7, start=0, every=3, console=console) as progress:
        for step in range(1, steps + 1):
            progress.update(step, record)
            if step == 4:
                progress.note("checkpoint saved: runs/[4]")
    return stream.getvalue()


def test_a_log_gets_one_line_an_interval_and_the_first_and_the_last():
    lines = shown(terminal=False).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1/7",
        "step 3/7",
        "checkpoint saved: runs/[4]",
        "step 6/7",
        "step 7/7",
    ]
    assert lines[0].split(" | ")[1:-2] == [
        "loss 3.2500",
        "lr 3.00e-04",
        "norm 1.23",
        "12.3k tok/s",
        "42.1 TFLOP/s",
        "mfu 41.2%",
        "1.5 GiB",
        "reward accuracy 0.625",
    ]
    assert lines[-1].endswith("| elapsed 0:00 | eta 0:00")


def test_what_is_unknown_is_left_out():
    assert "mfu" not in shown(terminal=False, record=RECORD | {"mfu": None})


def test_the_bar_keeps_to_the_terminal_and_breaks_between_fields():
    text = shown(terminal=True, width=80)
    last = text.split("step 7/7")[-1]
    assert "100%" in last and "3.2500" in last
    rows = [row.rstrip() for row in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()]
    assert max(len(row) for row in rows) <= 80
    assert "loss 3.2500  lr 3.00e-04  norm 1.23  12.3k tok/s  42.1 TFLOP/s  mfu 41.2%" in rows[-2]
    assert rows[-1] == "1.5 GiB  reward accuracy 0.625"
    assert text.count("checkpoint saved: runs/[4]") == 1


def test_the_inside_of_a_long_step_is_shown(monkeypatch):
    monkeypatch.setattr(megallama.runtime.progress, "FRAME", 0)
    monkeypatch.setattr(megallama.runtime.progress, "PLAIN_SECONDS", 0)
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=80, color_system=None)
        with Progress(total=3, console=console) as progress:
            progress.update(1, RECORD)
            with progress.within("answers", 40) as report:
                report(10)
                report(5)
            progress.update(2, RECORD)
        before, after = stream.getvalue().rsplit("answers 15/40", 1)
        assert "answers 10/40" in before and "a second" in after and "answers" not in after
    with Progress.silent() as progress, progress.within("answers", 2) as report:
        report(2)


def test_other_ranks_are_silent(capfd):
    with Progress.silent() as progress:
        progress.update(1, RECORD)
        progress.note("nothing")
    assert capfd.readouterr() == ("", "")


def test_numbers():
    assert [scaled(x) for x in (0.5, 950, 12345.6, 4.56e6, 2e9)] == ["0.5", "950", "12.3k", "4.56M", "2G"]
    assert [clock(s) for s in (7, 185, 7385, 4 * 86400 + 7385, float("inf"))] == [
        "0:07", "3:05", "2:03:05", "4d 02:03", "-:--",
    ]  # fmt: skip
