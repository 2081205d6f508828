"""Train a SentencePiece tokenizer like Llama 2's, or wrap one that exists.

python tools/train_tokenizer.py --input corpus/*.jsonl --vocab-size 32000 --output tokenizer     -> tokenizer.model
python tools/train_tokenizer.py --wrap path/to/hf_model_folder --output tokenizer                -> tokenizer.model

Byte-pair encoding; every digit its own token; characters outside the vocabulary fall back to bytes, so any text comes
back unchanged; no Unicode normalisation; whitespace is kept; <unk> 0, <s> 1, </s> 2 and no padding token.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megallama.data import Reading, find_files, load_tokenizer, wrap_tokenizer
from megallama.data.text import cut, read

BYTES_AND_SPECIALS = 256 + 3
COVERAGE = 0.99995  # share of the text's characters that get their own token; the others are spelt in bytes
LONGEST_LINE = 1000  # characters; the trainer drops sentences above 4192 bytes


def lines(inputs: Sequence[str], reading: Reading) -> Iterator[str]:
    """The lines of all documents, long ones cut at a space. Newlines themselves are spelt as bytes, as in Llama 2."""
    for part in cut(find_files(inputs), reading, 64 << 20):
        for record in (record for piece in part for record in read(piece, reading)):
            for line in (record.text or "").split("\n"):
                while len(line) > LONGEST_LINE:
                    at = line.rfind(" ", 1, LONGEST_LINE)
                    at = at if at > 0 else LONGEST_LINE
                    yield line[:at]
                    line = line[at:]
                if line:
                    yield line


def train(sentences: Iterator[str], vocab_size: int, coverage: float, max_lines: int) -> bytes:
    """The trained model.

    Raises:
        RuntimeError: the vocabulary does not fit the text (SentencePiece's message).
    """
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # only matters where the lines are sampled
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=coverage,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        input_sentence_size=max_lines,
        shuffle_input_sentence=True,
        num_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        minloglevel=2,
    )
    return out.getvalue()


class Kept(dict[int, int]):
    """A table for str.translate that drops every character not in it."""

    def __missing__(self, character: int) -> None:
        return None


def fit(inputs: Sequence[str], reading: Reading, vocab_size: int, max_lines: int) -> bytes:
    """Train on `inputs`. A vocabulary too small for the usual coverage sees only the most frequent characters.

    Raises:
        ValueError: the vocabulary is too large or too small, with the nearest possible size.
    """
    smallest = BYTES_AND_SPECIALS + 3
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size {vocab_size} is too small: bytes and special tokens alone need {smallest}")
    if next(lines(inputs, reading), None) is None:
        raise ValueError("the input holds no text; check --input and --json-keys")
    try:
        try:
            return train(lines(inputs, reading), vocab_size, COVERAGE, max_lines)
        except RuntimeError as error:
            if "required_chars" not in str(error):
                raise
        counts: Counter[str] = Counter()
        for line in lines(inputs, reading):
            counts.update(line)
        room = max(2, (vocab_size - BYTES_AND_SPECIALS) // 2)  # the other half is for merges
        kept = Kept((ord(character),) * 2 for character, _ in counts.most_common(room))
        return train((line.translate(kept) for line in lines(inputs, reading)), vocab_size, 1.0, max_lines)
    except RuntimeError as error:
        if most := re.search(r"value <= (\d+)", str(error)):
            raise ValueError(
                f"--vocab-size {vocab_size} is more than this text has pieces for: "
                f"the largest possible is {most[1]}; lower it or add text"
            ) from None
        raise ValueError(f"SentencePiece cannot train on this text: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help="JSONL (also .gz, .zst), parquet, text, or folders")
    source.add_argument("--wrap", metavar="PATH", help="a SentencePiece .model, a tokenizer.json or an HF model folder")
    parser.add_argument("--vocab-size", type=int, help="number of ids, any; needed with --input (Llama 2: 32000)")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="default: text")
    parser.add_argument(
        "--max-lines", type=int, default=10_000_000, help="lines drawn from a larger corpus (%(default)s)"
    )
    arguments = parser.parse_args()
    target = Path(arguments.output + ".model")
    started = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.touch()  # a folder that cannot be written shows before the work, not after it
        try:
            if arguments.wrap:
                tokenizer = wrap_tokenizer(arguments.wrap, target)
            else:
                if arguments.vocab_size is None:
                    raise ValueError("--input needs --vocab-size")
                reading = Reading(json_keys=tuple(arguments.json_keys))
                temporary.write_bytes(fit(arguments.input, reading, arguments.vocab_size, arguments.max_lines))
                temporary.replace(target)
                tokenizer = load_tokenizer(target)
        finally:
            temporary.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"train_tokenizer: error: {error}")
    print(f"{target}: {tokenizer.vocab_size} ids, BOS {tokenizer.bos}, EOS {tokenizer.eos}, ", end="")
    print(f"{time.monotonic() - started:.1f} s, fingerprint {tokenizer.fingerprint()[:16]}")


if __name__ == "__main__":
    main()
