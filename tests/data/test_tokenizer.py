"""Tokenizers of both libraries behind one interface, and the vocabulary checks before a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from documents import sentences

from megallama.data import Tokenizer, check_vocabulary, load_tokenizer, wrap_tokenizer

TEXTS = [*sentences(20), "  two  spaces\n\n\ttab", "unseen: ∑ ☃ \U0001f600", ""]


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer.json whose EOS has an unusual name, as told by its config."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350, special_tokens=["<s>", "<stop>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(100), trainer)
    # What must not leak into the data: special tokens, padding, truncation.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "<stop>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def check(tokenizer: Tokenizer) -> None:
    batches = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, batches, strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.bos not in ids and tokenizer.eos not in ids


def test_sentencepiece(tokenizer_path: Path, tool, tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n".join(sentences(300)))
    made = tool("train_tokenizer", "--input", tmp_path / "text.txt", "--vocab-size", 320, "--output", tmp_path / "t")
    assert made.returncode == 0, made.stderr
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (320, 1, 2)
    check(tokenizer)
    # Llama 2's habits: every digit alone, unknown characters and newlines as bytes.
    pieces = tokenizer._processor.encode("in 1984\n☃", out_type=str)
    assert [p for p in pieces if any(c.isdigit() for c in p)][:4] == ["1", "9", "8", "4"]
    assert pieces[-4:] == ["<0x0A>", "<0xE2>", "<0x98>", "<0x83>"]
    assert load_tokenizer(tokenizer_path).fingerprint() != tokenizer.fingerprint()


def test_hf_and_wrapping(hf_folder: Path, tokenizer_path: Path, tmp_path: Path):
    for path in (hf_folder, hf_folder / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos, tokenizer.eos) == (0, 1) and tokenizer.vocab_size <= 350
        check(tokenizer)
    for source in (hf_folder, tokenizer_path):
        wrapped = wrap_tokenizer(source, tmp_path / "wrapped.model")
        again = load_tokenizer(tmp_path / "wrapped.model")
        assert again.fingerprint() == wrapped.fingerprint() == load_tokenizer(source).fingerprint()
        assert (again.bos, again.eos) == (wrapped.bos, wrapped.eos)
        assert again.encode_batch(TEXTS) == load_tokenizer(source).encode_batch(TEXTS)


def test_folder_with_a_sentencepiece_model(tokenizer_path: Path, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert load_tokenizer(tmp_path).fingerprint() == load_tokenizer(tokenizer_path).fingerprint()


def test_bad_tokenizers(tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "gone.model")
    for content in (b"garbage", b"", b"\0\xff" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match="neither a SentencePiece model"):
            load_tokenizer(tmp_path / "bad.model")
    for content in (b"{", b'{"no": "tokenizer"}'):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model"):
            load_tokenizer(tmp_path / "bad.model")
    (hf_folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(ValueError, match="EOS token '<none>' is not in its vocabulary"):
        load_tokenizer(hf_folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install megallama\[hf\]"):
        load_tokenizer(hf_folder)


def test_vocabulary_mismatch_is_told_before_a_run(tokenizer_path: Path, tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_path)
    prefix = str(tmp_path / "corpus")
    check_vocabulary([prefix], 100)  # nothing known of it
    settings = {"tokenizer": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}
    Path(prefix + ".json").write_text(json.dumps({"settings": settings}))
    check_vocabulary([prefix], tokenizer.vocab_size, tokenizer)
    with pytest.raises(ValueError, match=r"set model.vocab_size to at least"):
        check_vocabulary([], tokenizer.vocab_size - 1, tokenizer)
    with pytest.raises(ValueError, match=r"corpus was made with a vocabulary of \d+, but model.vocab_size=100"):
        check_vocabulary([prefix], 100)
    Path(prefix + ".json").write_text(json.dumps({"settings": {**settings, "tokenizer": "0" * 64}}))
    with pytest.raises(ValueError, match="made with tokenizer 0000000000000000"):
        check_vocabulary([prefix], tokenizer.vocab_size, tokenizer)
