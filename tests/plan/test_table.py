"""Tables of steps: the calibration file, predictions beside it, and bad rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megallama.cli import main
from megallama.config import load
from megallama.plan.job import job_of
from megallama.plan.table import COLUMNS, PREDICTED, estimate, read_table

MEASURED = Path(__file__).parents[2] / "tools" / "planner" / "measured_a100.csv"
ROW = dict(
    zip(
        COLUMNS,
        (
            "24",
            "2304",
            "24",
            "24",
            "9216",
            "0",
            "51200",
            "2048",
            "1",
            "1",
            "1",
            "32",
            "16",
            "512",
            "0",
            "full",
            "1f1b",
            "selene",
        ),
        strict=True,
    )
)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def test_larger_models_that_nothing_was_fitted_to_are_predicted(tmp_path: Path):
    target = tmp_path / "predicted.csv"
    assert estimate(MEASURED.with_name("larger_a100.csv"), target) == 6
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    off = [float(row["predicted_step_seconds"]) / float(row["step_seconds"]) - 1 for row in rows]
    assert {row["model"] for row in rows} == {"175B", "530B", "1T"} and max(map(abs, off)) < 0.08


def test_the_calibration_file_is_predicted_row_by_row(tmp_path: Path):
    target = tmp_path / "predicted.csv"
    assert estimate(MEASURED, target) == 767
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 767 and set(PREDICTED) <= set(rows[0]) and rows[0]["model"] == "1.7B"
    off = [float(row["predicted_step_seconds"]) / float(row["step_seconds"]) - 1 for row in rows]
    assert sum(map(abs, off)) / len(off) < 0.1
    first = rows[0]  # 1.7B: the paper's 137 TFLOP/s count recomputation, these do not
    assert float(first["predicted_mfu"]) == pytest.approx(float(first["predicted_tflops_per_gpu"]) / 312, rel=1e-4)
    assert 90 < float(first["predicted_tflops_per_gpu"]) < 137 and 20 < float(first["predicted_memory_gib"]) < 80


def test_a_table_without_measurements_and_with_llamas(tmp_path: Path):
    llama = {**ROW, "gated_mlp": "1", "num_key_value_heads": "8", "intermediate_size": "6144", "cluster": "h100"}
    source = write(tmp_path / "rows.csv", [ROW, llama | {"sequence_parallel": "1", "recompute": "none"}])
    assert main(["plan", "--estimate", str(source), "--out", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        a, b = csv.DictReader(file)
    assert float(b["predicted_step_seconds"]) < float(a["predicted_step_seconds"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cluster": "moon"}, "the cluster 'moon' is unknown"),
        ({"tp": "0"}, "tp='0' must be a whole number above 0"),
        ({"tp": "x"}, "tp='x' must be a whole number"),
        ({"gated_mlp": "2"}, "gated_mlp='2' must be 0 or 1"),
        ({"recompute": "some"}, "recompute='some' is unknown; choose one of none, selective, full"),
        ({"schedule": "2f2b"}, "schedule='2f2b' is unknown"),
        ({"global_batch_size": "500"}, "global_batch_size=500 is no multiple of micro_batch_size x dp = 512"),
        ({"pp": "32"}, "num_layers=24 are fewer than pp x vpp = 32 stages"),
        ({"vpp": "2", "pp": "2"}, "vpp=2 needs the schedule interleaved"),
        ({"num_attention_heads": "25"}, "hidden_size=2304 is no multiple of 25 heads"),
        ({"num_key_value_heads": "7"}, "num_attention_heads=24 is no multiple of num_key_value_heads=7"),
        ({"num_key_value_heads": "6", "tp": "4", "dp": "8"}, "num_key_value_heads=6 and tp=4: one must be a multiple"),
        ({"intermediate_size": "9217", "tp": "2", "dp": "16"}, "intermediate_size=9217 is no multiple of tp=2"),
        (
            {"schedule": "interleaved", "pp": "3", "vpp": "2", "dp": "2", "global_batch_size": "128"},
            "the interleaved schedule needs",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, change: dict, problem: str):
    source = write(tmp_path / "rows.csv", [ROW, ROW | change])
    target = tmp_path / "out.csv"
    assert main(["plan", "--estimate", str(source), "--out", str(target)]) == 2
    told = capsys.readouterr().err
    assert f"{source}:3: " in told and problem in told and told.count("\n") == 1
    assert not target.exists()


def test_bad_tables_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="the column num_layers is missing"):
        read_table(write(tmp_path / "a.csv", [{"tp": "1"}]))
    with pytest.raises(ValueError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    twice = tmp_path / "twice.csv"
    twice.write_text(f"tp,{','.join(COLUMNS)}\n")
    with pytest.raises(ValueError, match="the column tp comes twice"):
        read_table(twice)
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="has no row"):
        read_table(empty)
    empty.write_text(",".join(COLUMNS) + "\n1,2\n")
    with pytest.raises(ValueError, match=r"empty\.csv:2: the row has more or fewer fields"):
        read_table(empty)


def test_tables_of_spreadsheets_are_read_and_options_beside_a_table_refused(tmp_path: Path, capsys):
    source = write(tmp_path / "rows.csv", [ROW])
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(read_table(source)) == 1
    assert main(["plan", "--estimate", str(source), "--out", str(tmp_path / "out.csv"), "--cluster", "h100"]) == 2
    assert "--estimate takes everything from its table; --cluster has no place" in capsys.readouterr().err


def test_a_row_of_this_engine_has_its_stages(tmp_path: Path):
    given = {"gated_mlp": "1", "num_layers": "48", "pp": "5", "dp": "4", "num_key_value_heads": "8"}
    shape = {"hidden_size": "8192", "num_attention_heads": "64", "intermediate_size": "22016", "vocab_size": "32000"}
    asked = read_table(write(tmp_path / "rows.csv", [ROW | given | shape]))[0].job
    text = "--model.preset llama2-34b --parallel.pp 5 --train.global_batch_size 512 --train.micro_batch_size 16"
    config = load([*text.split(), "--parallel.recompute", "full", "--data.seq_length", "2048"])
    assert asked.layers == job_of(config, 20).layers and len(set(asked.layers)) > 1
