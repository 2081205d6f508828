"""A tokenizer, and a run's folder with a checkpoint of random weights, for the stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from tiny_llama import TALKER, RandomSource

from megallama.checkpoint.formats.native import write_store
from megallama.data.tokenizer import SentencePieceTokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece with byte fallback: what it has not seen comes in bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("the llama sat on the mat and there was a blank first\nhello there new tab and 12 llamas\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "t"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "t.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_file.read_bytes())


@pytest.fixture(scope="session")
def run(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; its run.yaml is the run's configuration."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_store(RandomSource(TALKER), folder / "checkpoints" / "step_00000003")
    (folder / "run.yaml").write_text(f"""
output_dir: {folder}
data: {{tokenizer: {tokenizer_file}}}
train: {{dtype: float64}}
generate: {{max_new_tokens: 12}}
""")
    return folder
