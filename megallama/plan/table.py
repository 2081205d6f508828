"""Tables of training steps, measured or asked for: a CSV file whose rows are jobs, and the predictions beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megallama.config import ModelConfig, ParallelConfig
from megallama.files import write_whole
from megallama.pipeline import SCHEDULES
from megallama.plan.cluster import Cluster, load_cluster
from megallama.plan.cost import stage_layers
from megallama.plan.job import MEGALLAMA, MEGATRON_2021, Job, Layout, Shape
from megallama.plan.machine import Machine, fitted
from megallama.plan.memory import job_memory
from megallama.plan.step import predict
from megallama.plan.work import tflops

NUMBERS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "gated_mlp",
    "vocab_size", "seq_length", "tp", "pp", "vpp", "dp", "micro_batch_size", "global_batch_size", "sequence_parallel",
)  # fmt: skip
COLUMNS = (*NUMBERS, "recompute", "schedule", "cluster")
"""What a row must have; others are kept as they are."""
PREDICTED = ("predicted_step_seconds", "predicted_tflops_per_gpu", "predicted_memory_gib", "predicted_mfu")
FLAGS = ("gated_mlp", "sequence_parallel")
GIB = 2**30


class Asked(NamedTuple):
    """A row of a table."""

    job: Job
    cluster: Cluster
    record: dict[str, str]
    where: str


def read_table(path: str | Path) -> list[Asked]:
    """The jobs of a CSV file.

    Raises:
        ValueError: the file or a row of it is bad; names the line and the column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or ()
            if twice := [name for name in names if list(names).count(name) > 1]:
                raise ValueError(f"{path}: the column {twice[0]} comes twice")
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise ValueError(f"{path}: the column {missing[0]} is missing; a table has {', '.join(COLUMNS)}")
            found = [_asked(row, f"{path}:{rows.line_num}") for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"{path} has no row")
    return found


def _asked(row: Mapping[str, str], where: str) -> Asked:
    if None in row or None in row.values():
        raise ValueError(f"{where}: the row has more or fewer fields than the first line names")
    try:
        cluster = load_cluster(row["cluster"])
        return Asked(job_of_row(row), cluster, dict(row), where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def job_of_row(row: Mapping[str, str]) -> Job:
    """The job that a row describes. Shapes without a gated feed-forward are those that Megatron-LM was measured with
    in 2021 and 2022, and are predicted for that software.

    Raises:
        ValueError: a field is no number of the right range, or the fields contradict each other.
    """
    n = {name: _number(row, name) for name in NUMBERS}
    for name, known in (("recompute", ("none", "selective", "full")), ("schedule", tuple(SCHEDULES))):
        if row[name] not in known:
            raise ValueError(f"{name}={row[name]!r} is unknown; choose one of {', '.join(known)}")
    shape = Shape(
        n["num_layers"], n["hidden_size"], n["num_attention_heads"], n["num_key_value_heads"],
        n["intermediate_size"], n["vocab_size"], bool(n["gated_mlp"]),
    )  # fmt: skip
    layout = Layout(
        n["tp"], n["pp"], n["dp"], n["micro_batch_size"], n["vpp"], row["schedule"], row["recompute"],
        bool(n["sequence_parallel"]),
    )  # fmt: skip
    rules = (
        (shape.hidden % shape.heads == 0, f"hidden_size={shape.hidden} is no multiple of {shape.heads} heads"),
        (
            shape.heads % shape.kv_heads == 0,
            f"num_attention_heads={shape.heads} is no multiple of num_key_value_heads={shape.kv_heads}",
        ),
        (
            shape.kv_heads % layout.tp == 0 or layout.tp % shape.kv_heads == 0,
            f"num_key_value_heads={shape.kv_heads} and tp={layout.tp}: one must be a multiple of the other",
        ),
        (
            shape.intermediate % layout.tp == 0,
            f"intermediate_size={shape.intermediate} is no multiple of tp={layout.tp}",
        ),
        (shape.heads % layout.tp == 0, f"num_attention_heads={shape.heads} is no multiple of tp={layout.tp}"),
        (shape.layers >= layout.stages, f"num_layers={shape.layers} are fewer than pp x vpp = {layout.stages} stages"),
        (
            n["global_batch_size"] % (layout.micro_batch * layout.dp) == 0,
            f"global_batch_size={n['global_batch_size']} is no multiple of micro_batch_size x dp = "
            f"{layout.micro_batch * layout.dp}",
        ),
        (layout.vpp == 1 or layout.schedule == "interleaved", f"vpp={layout.vpp} needs the schedule interleaved"),
    )
    for holds, problem in rules:
        if not holds:
            raise ValueError(problem)
    if not shape.gated:
        return Job(shape, n["seq_length"], n["global_batch_size"], layout, engine=MEGATRON_2021)
    model = ModelConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab,
    )  # fmt: skip
    parallel = ParallelConfig(pp=layout.pp, vpp=layout.vpp, schedule=layout.schedule, recompute=layout.recompute)
    layout = layout._replace(layers_per_stage=stage_layers(model, parallel, n["seq_length"]))
    return Job(shape, n["seq_length"], n["global_batch_size"], layout, engine=MEGALLAMA)


def _number(row: Mapping[str, str], name: str) -> int:
    text, least = row[name].strip(), 0 if name in FLAGS else 1
    if not text.isdecimal() or int(text) < least or (name in FLAGS and int(text) > 1):
        raise ValueError(f"{name}={row[name]!r} must be {'0 or 1' if name in FLAGS else 'a whole number above 0'}")
    return int(text)


def predicted(asked: Asked) -> dict[str, float]:
    """The columns that `estimate` adds to a row."""
    job, cluster = asked.job, asked.cluster
    seconds = predict(job, Machine(cluster, fitted())).seconds
    speed, memory = tflops(job, seconds), max(part.total for part in job_memory(job)) / GIB
    return dict(zip(PREDICTED, (seconds, speed, memory, speed / cluster.peak_tflops), strict=True))


def estimate(source: str | Path, target: str | Path) -> int:
    """Write the table with predictions; the number of its rows.

    Raises:
        ValueError: as `read_table`, or the target cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for asked in read_table(source):
        try:
            numbers = predicted(asked)
        except ValueError as error:  # a program or a cluster that cannot be
            raise ValueError(f"{asked.where}: {error}") from None
        rows.append(asked.record | {name: f"{value:.6g}" for name, value in numbers.items()})
    try:
        write_whole(Path(target), _csv(rows))
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from None
    return len(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
