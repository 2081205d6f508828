"""What a run measures: metrics.jsonl (one object a step) and TensorBoard scalars, written by one rank."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

FILE = "metrics.jsonl"
Value = float | int | str | None


class Metrics:
    """Writes a run's metrics into its folder. A resumed run continues the file without a step told twice.

    Args:
        folder: the run's folder; metrics.jsonl and tensorboard/ appear in it.
        resume_step: the last step that the loaded checkpoint has seen; later steps of an earlier process are dropped.
    """

    def __init__(self, folder: str | os.PathLike, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds: not for those who only read metrics

        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = [record for record in read_metrics(path) if record["step"] <= resume_step] if path.exists() else []
        fresh = path.with_suffix(".tmp")
        with fresh.open("w") as out:
            out.writelines(json.dumps(record) + "\n" for record in keep)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False
        self._board: SummaryWriter | None = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def write(self, record: Mapping[str, Value]) -> str | None:
        """Add one step: `step` and whatever was measured. JSON has no NaN and no infinity: they are written as null.

        A full disk stops nothing: records wait for space. Returns a line about that when it begins and when it ends.
        """
        line = json.dumps({key: None if _strange(value) else value for key, value in record.items()}, allow_nan=False)
        self._unwritten += f"{line}\n".encode()
        was, self._full = self._full, False
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            self._full = True
            fault = f"{FILE} cannot be written, records wait in memory: {error.strerror}"
        self._to_board(record)
        if was == self._full:
            return None
        return fault if self._full else f"{FILE} is written again, nothing is missing in it"

    def _to_board(self, record: Mapping[str, Value]) -> None:
        """TensorBoard's writer does not recover from a full disk: it is left, until the next start."""
        try:
            for key, value in record.items():
                if self._board is not None and key != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(key, value, record["step"])
        except OSError:
            self._board = None


def _strange(value: Value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records of a metrics.jsonl (or of the run folder that has one), in order.

    A last line without its end is left out: a running process may be writing it, or was killed while it did.

    Raises:
        ValueError: another line is not a JSON object with a step.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    records = []
    lines = file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file}:{number} is not a JSON object with a step: {line[:60]!r}") from None
        records.append(record)
    return records


def throughput(
    tokens: int, seconds: float, flops_per_token: float, devices: int, peak_tflops: float | None
) -> dict[str, float | None]:
    """The speed of one step, by its keys in metrics.jsonl.

    Args:
        tokens: of the global batch.
        flops_per_token: model FLOPs of forward and backward; recompute is not counted.
        devices: ranks that share the work.
        peak_tflops: of one device; None (unknown) makes mfu null.
    """
    tflops = tokens * flops_per_token / seconds / devices / 1e12
    return {
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops_per_device": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
    }


def memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors of this process on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
