"""What a dataset was made of: OUT.json, written by preprocessing beside OUT.bin and OUT.idx. Optional for readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megallama.files import write_whole

from .tokenizer import Tokenizer


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no such file or it is not whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Appears complete or not at all."""
    write_whole(Path(path), json.dumps(content, indent=1) + "\n")


def check_vocabulary(prefixes: Sequence[str], vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
    """Whether model, tokenizer and data belong together, before a run starts.

    Data without an OUT.json (made elsewhere) passes here; the loader still checks every id that it reads.

    Args:
        prefixes: of data.sources.
        vocab_size: model.vocab_size.
        tokenizer: the one named by data.tokenizer, if any.

    Raises:
        ValueError: ids may exceed vocab_size, or data was made with another tokenizer.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size={vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    for prefix in prefixes:
        settings = (read_json(prefix + ".json") or {}).get("settings", {})
        made_with = settings.get("vocab_size", 0)
        if made_with > vocab_size:
            raise ValueError(
                f"source {prefix} was made with a vocabulary of {made_with}, but model.vocab_size={vocab_size}; "
                f"set model.vocab_size to at least {made_with}, or preprocess the source again"
            )
        known = settings.get("tokenizer")
        if tokenizer is not None and known and known != tokenizer.fingerprint():
            raise ValueError(
                f"source {prefix} was made with tokenizer {known[:16]}, but data.tokenizer is "
                f"{tokenizer.fingerprint()[:16]}; name the tokenizer that made it, or preprocess the source again"
            )
