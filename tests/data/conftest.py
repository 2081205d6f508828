"""A small tokenizer, small datasets with a known content, and a way to run the tools as users do."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from documents import ROOT, TOOL_ENVIRONMENT, sentences
from hypothesis import settings

from megallama.data import IndexedDataset, IndexedWriter

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 ids with Llama 2's special tokens."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)), model_writer=out, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[[Sequence[int], str], IndexedDataset]:
    """make_dataset(document lengths, name): tokens count up from 0 over the whole stream, so each tells its place."""

    def make(lengths: Sequence[int], name: str = "corpus") -> IndexedDataset:
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            for length in lengths:
                writer.add_document(np.arange(length) + writer.num_tokens)
        return IndexedDataset(tmp_path / name)

    return make


@pytest.fixture
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """tool("preprocess_data", "--input", …): runs tools/preprocess_data.py and returns what it said."""

    def run(name: str, *arguments: object, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        command = [*launcher, sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=TOOL_ENVIRONMENT, timeout=120)

    return run
