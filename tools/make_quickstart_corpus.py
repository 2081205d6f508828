"""Collect a small corpus of real text from the Python installation that runs this: its documentation topics and the
sources of its standard library, as JSONL files.

python tools/make_quickstart_corpus.py --output corpus                                            -> corpus/*.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

# Not library code: tests, third-party packages, build leftovers, and tables of data spelt as source.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
LEAST_BYTES = 1 << 20
MOST_BYTES = 14 << 20
FILE_BYTES = 4 << 20


def topics() -> Iterator[str]:
    """The language reference's topics, as `help()` shows them; some distributions leave them out."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return
    for name in sorted(found):
        yield found[name].strip()


def sources(root: Path) -> Iterator[str]:
    """The library's modules under `root`, in the order of their paths."""
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if SKIPPED.isdisjoint(folders) and not any(folder.startswith("config-") for folder in folders):
            try:
                with tokenize.open(path) as file:  # heeds the coding line
                    yield file.read().strip()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue


def distinct(documents: Iterable[str]) -> Iterator[str]:
    """Each document once, empty ones never."""
    seen = {b""}
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest() if text else b""
        if digest not in seen:
            seen.add(digest)
            yield text


def write(documents: Iterable[str], folder: Path) -> tuple[int, int]:
    """Write text_00.jsonl, text_01.jsonl, … up to MOST_BYTES in all; returns (documents, bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    count = total = 0
    names: list[Path] = []
    block: list[str] = []

    def flush() -> None:
        if block:
            names.append(folder / f"text_{len(names):02d}.jsonl")
            temporary = names[-1].with_suffix(".tmp")
            temporary.write_text("".join(block), encoding="utf-8")
            temporary.replace(names[-1])
            block.clear()

    for text in documents:
        line = json.dumps({"text": text}) + "\n"
        if total + len(line) > MOST_BYTES:
            break
        block.append(line)
        count, total = count + 1, total + len(line)
        if sum(map(len, block)) >= FILE_BYTES:
            flush()
    flush()
    for stale in set(folder.glob("text_*.jsonl")) - set(names):
        stale.unlink()
    return count, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the JSONL files")
    folder = Path(parser.parse_args().output)

    def documents() -> Iterator[str]:
        yield from topics()
        yield from sources(Path(sysconfig.get_paths()["stdlib"]))

    try:
        count, total = write(distinct(documents()), folder)
    except OSError as error:
        sys.exit(f"make_quickstart_corpus: error: {error}")
    if total < LEAST_BYTES:
        sys.exit(f"make_quickstart_corpus: error: only {total} bytes of text in this Python; use a complete one")
    print(f"{folder}: {count} documents, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
