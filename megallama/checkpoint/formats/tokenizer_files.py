"""The tokenizer that goes along with a model: the same files, under the names that others look for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megallama.config import ModelConfig
from megallama.data.tokenizer import WRAPPED, HFTokenizer, SentencePieceTokenizer, load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"


def tokenizer_in(folder: Path) -> Path | None:
    """What `load_tokenizer` opens of a model's folder; None where it has no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return folder
    return folder / "tokenizer.model" if (folder / "tokenizer.model").is_file() else None


def fitting_tokenizer(path: Path, model: ModelConfig) -> SentencePieceTokenizer | HFTokenizer:
    """A tokenizer, opened.

    Raises:
        ValueError: it is none, or has more ids than the model.
    """
    opened = load_tokenizer(path)
    if opened.vocab_size > model.vocab_size:
        raise ValueError(
            f"{path} has {opened.vocab_size} ids, but the model's vocab_size is {model.vocab_size}; "
            f"give the tokenizer that the model was trained with"
        )
    return opened


def copy_along(tokenizer: Path | None, folder: Path) -> None:
    """Copy a tokenizer as it is: no file; or one that its trainer named, alone; or a model's folder or a file of it,
    with what lies beside it and the generation settings."""
    if tokenizer is None:
        return
    if tokenizer.is_file() and tokenizer.name not in TOKENIZER_FILES:
        shutil.copyfile(tokenizer, folder / ("tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"))
        return
    source = tokenizer if tokenizer.is_dir() else tokenizer.parent
    for name in (*TOKENIZER_FILES, GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_for_transformers(source: Path, folder: Path) -> None:
    """Tokenizer files that transformers opens."""
    if source.name == "tokenizer.json":
        source = source.parent  # the files that name its special tokens lie beside it
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    opened = load_tokenizer(source)
    if isinstance(opened, SentencePieceTokenizer):
        shutil.copyfile(source, folder / "tokenizer.model")
        # No BOS: pretraining puts an EOS after each document and nothing before it.
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False, "add_eos_token": False}
        write_json(folder / "tokenizer_config.json", settings)
        return
    content = json.loads(source.read_text(encoding="utf-8"))
    names = {}
    if content.get("format") == WRAPPED:
        names = {f"{kind}_token": content[kind] for kind in ("bos", "eos")}
        content = content["tokenizer"]
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file for people to read as well."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
