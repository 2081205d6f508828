"""One small interface over SentencePiece and Hugging Face tokenizers: text to ids and back, special tokens by id."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

WRAPPED = "megallama-tokenizer"
"""Format mark of a wrapped Hugging Face tokenizer: one JSON file, its tokenizer.json and the names of BOS and EOS."""

# Begin- and end-of-text names, tried in this order where a bare tokenizer.json does not say which they are.
KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        bos, eos: ids of the begin- and end-of-text tokens, None where the tokenizer has none.
    """

    vocab_size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special token added."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one thread where the library allows it, since preparation runs many processes."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""

    def token_id(self, piece: str) -> int | None:
        """The id of exactly this piece or added token, None where there is none."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the model: equal fingerprints encode equally."""


class SentencePieceTokenizer:
    """A SentencePiece .model.

    Raises:
        ValueError: the bytes are no SentencePiece model.
    """

    def __init__(self, model: bytes, name: str = "model"):
        import sentencepiece

        try:
            if not model:  # the library would take it for a model without pieces
                raise RuntimeError
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{name}: neither a SentencePiece model nor a tokenizer.json; is it damaged?") from None
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.bos = _present(self._processor.bos_id())
        self.eos = _present(self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def token_id(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)  # unknown pieces get the id of <unk>
        return found if self._processor.id_to_piece(found) == piece else None

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def save(self, path: Path) -> None:
        path.write_bytes(self._model)


class HFTokenizer:
    """A Hugging Face fast tokenizer, from the text of its tokenizer.json.

    Args:
        text: contents of tokenizer.json.
        bos, eos: names of the special tokens; None = looked up among the usual names.
        name: for messages.

    Raises:
        ValueError: the library is missing, the text is no tokenizer, or it lacks a token that is named.
    """

    def __init__(self, text: str, bos: str | None = None, eos: str | None = None, name: str = "tokenizer"):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{name} needs the Hugging Face libraries: pip install megallama[hf]") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{name}: no tokenizer.json of the Hugging Face tokenizers library ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for kind, token in (("BOS", bos), ("EOS", eos)):
            if token is not None and token not in vocabulary:
                raise ValueError(f"{name}: its {kind} token {token!r} is not in its vocabulary; correct its config")
        self._bos = bos or next((token for token in KNOWN_BOS if token in vocabulary), None)
        self._eos = eos or next((token for token in KNOWN_EOS if token in vocabulary), None)
        self.bos = vocabulary[self._bos] if self._bos else None
        self.eos = vocabulary[self._eos] if self._eos else None
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [coded.ids for coded in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._content().encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self._content(), encoding="utf-8")

    def _content(self) -> str:
        """The wrapped form (WRAPPED): it keeps which tokens are BOS and EOS, which tokenizer.json does not."""
        inner = json.loads(self._tokenizer.to_str())
        return json.dumps({"format": WRAPPED, "bos": self._bos, "eos": self._eos, "tokenizer": inner}, sort_keys=True)


def _present(token: int) -> int | None:
    """SentencePiece says -1 for a token that it does not have."""
    return token if token >= 0 else None


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | HFTokenizer:
    """Open a tokenizer: a SentencePiece .model, a tokenizer.json, a wrapped one (`train_tokenizer.py --wrap`), or a
    Hugging Face model folder. What a file is, is told by its content.

    Raises:
        ValueError: there is no such tokenizer, it is damaged, or the library that reads it is missing.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; give a SentencePiece .model, a tokenizer.json or an HF folder")
    data = path.read_bytes()
    if not data.lstrip().startswith(b"{"):
        return SentencePieceTokenizer(data, str(path))
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: neither a SentencePiece model nor valid JSON ({error})") from None
    if content.get("format") == WRAPPED:
        return HFTokenizer(json.dumps(content["tokenizer"]), content["bos"], content["eos"], str(path))
    return HFTokenizer(data.decode(), *_special_names(path.parent), str(path))


def _load_folder(folder: Path) -> SentencePieceTokenizer | HFTokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return load_tokenizer(folder / "tokenizer.model")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"{folder} has no tokenizer.json or tokenizer.model; other kinds need: pip install megallama[hf]"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return HFTokenizer(loaded.backend_tokenizer.to_str(), loaded.bos_token, loaded.eos_token, str(folder))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder}: transformers finds no fast tokenizer in it ({reason})") from None


def _special_names(folder: Path) -> tuple[str | None, str | None]:
    """(BOS, EOS) as named by the config files beside a tokenizer.json, None where they do not say."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            found.update(json.loads((folder / file).read_text(encoding="utf-8")))
    names = [found.get(f"{kind}_token") for kind in ("bos", "eos")]
    bos, eos = (name.get("content") if isinstance(name, dict) else name for name in names)
    return bos, eos


def wrap_tokenizer(source: str | Path, target: Path) -> SentencePieceTokenizer | HFTokenizer:
    """Save the tokenizer at `source` as the one file `target`, which `load_tokenizer` opens; returns it.

    Raises:
        ValueError: as load_tokenizer.
    """
    tokenizer = load_tokenizer(source)
    temporary = target.with_name(target.name + ".tmp")
    tokenizer.save(temporary)
    shutil.move(temporary, target)
    return tokenizer
