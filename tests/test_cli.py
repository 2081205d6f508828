"""The command line, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallama import __version__, cli
from megallama.config import Config, dump, load

ROOT = Path(__file__).parent.parent
TINY = "--model.hidden_size 64 --model.intermediate_size 96 --model.num_hidden_layers 4 --model.num_attention_heads 4 "
TINY += "--model.num_key_value_heads 2 --train.global_batch_size 8 --data.seq_length 32"


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in (*cli.RANK_VARIABLES, "WORLD_SIZE")} | environment
    command = [sys.executable, "-m", "megallama", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_help_is_quick_and_lists_the_stages() -> None:
    """Below half a second of processor time, which the load of the machine does not stretch as it does wall time."""
    before = os.times()
    done = start("--help")
    after = os.times()
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.STAGES)
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 0.5


def test_help_imports_neither_torch_nor_a_stage() -> None:
    code = "import sys; from megallama.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for arguments in (["--help"], ["pretrain", "--help"], ["pretrain", "--dry-run", *TINY.split()]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        loaded = set(done.stderr.split())
        assert "megallama.cli" in loaded
        assert not {name for name in loaded if name.split(".")[0] == "torch" or name.startswith("megallama.train")}


def test_stage_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for line in (
        "--optim.lr FLOAT",
        "peak learning rate. [0.0003]",
        "--train.ramp.start INT",
        "--data.sources [{prefix",
    ):
        assert line in text
    assert "--model.tie_word_embeddings BOOL" in text
    assert "[false]" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian"], ["unknown stage pretrian", *cli.STAGES]),
        (["pretrain", "--optim.learning_rate", "1"], ["optim.learning_rate", "did you mean optim.lr?"]),
        (["pretrain", "--dry-run", "--parallel.tp", "3"], ["num_attention_heads=32", "parallel.tp=3"]),
        (["pretrain", "--dry-run", "--world", "3", "--parallel.tp", "2"], ["3 ranks", "parallel.tp=2"]),
        (["pretrain", "--dry-run", "--world", "many"], ["--world", "many"]),
        (["pretrain", "--world", "2"], ["--dry-run"]),
        (["pretrain", "--config", "no.yaml"], ["no.yaml"]),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    done = start(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megallama: error: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("variable", cli.RANK_VARIABLES)
def test_other_ranks_stay_silent(
    variable: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in cli.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv(variable, rank)
        assert cli.main(["pretrain", "--lr", "1"]) == 2
        assert capfd.readouterr().err.count("\n") == lines


def test_dry_run_prints_the_layout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    command = ["pretrain", *TINY.split(), "--parallel.tp", "2", "--parallel.pp", "2", "--dry-run"]
    assert cli.main(command) == 0
    assert "4 = tp 2 x pp 2 x dp 1" in capsys.readouterr().out
    assert cli.main([*command, "--world", "8"]) == 0
    assert "8 = tp 2 x pp 2 x dp 2" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert cli.main(command) == 0
    assert "16 = tp 2 x pp 2 x dp 4" in capsys.readouterr().out


def test_a_stage_gets_the_configuration_and_its_code_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_stage.py").write_text(
        "from megallama.config import dump\n"
        "def run(config):\n"
        "    open(config.output_dir, 'w').write(dump(config))\n"
        "    return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.STAGES, "probe", cli.Stage("a stage of this test", "a_stage:run"))
    out = tmp_path / "config.yaml"
    arguments = [*TINY.split(), "--output_dir", str(out)]
    assert cli.main(["probe", *arguments]) == 7
    expected: Config = load(arguments)
    assert out.read_text() == dump(expected)
