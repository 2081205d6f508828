"""Look into a tokenised corpus, or find the documents that a training step has seen.

python tools/inspect_data.py data/corpus                                          header, counts, fingerprint
python tools/inspect_data.py data/corpus --validate                               … and a full scan of the index
python tools/inspect_data.py data/corpus --entropy                                unigram entropy in nats a token
python tools/inspect_data.py data/corpus --document 7 --tokenizer tokenizer.model document 7 as text
python tools/inspect_data.py --run runs/my_run --step 500                         the documents in step 500 of a run
python tools/inspect_data.py --run runs/my_run --step 500 --tokenizer tokenizer.model      … with their text
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megallama.data import IndexedDataset, Tokenizer, load_tokenizer, open_mixture
from megallama.data.ramp import BatchPlan

SCAN = 1 << 24  # tokens counted at a time
EXCERPT = 120  # characters of each sample shown by --run


def describe(dataset: IndexedDataset) -> str:
    """What the header and the ends of the index say."""
    lines = [
        f"{dataset.prefix}",
        f"  documents    {dataset.num_documents:,}",
        f"  sequences    {dataset.num_sequences:,}",
        f"  tokens       {dataset.num_tokens:,}",
        f"  dtype        {dataset.dtype.name}",
        f"  bytes        {dataset.num_tokens * dataset.dtype.itemsize:,}",
        f"  fingerprint  {dataset.fingerprint()}",
    ]
    if dataset.num_documents:
        lines.insert(4, f"  mean length  {dataset.num_tokens / dataset.num_documents:,.1f} tokens a document")
    return "\n".join(lines)


def unigram_entropy(dataset: IndexedDataset) -> float:
    """Entropy of the ids' frequencies in nats a token: the loss of a model that knows frequencies and no context."""
    counts = np.zeros(0, np.int64)
    for lo in range(0, dataset.num_tokens, SCAN):
        part = np.bincount(dataset.tokens(lo, min(lo + SCAN, dataset.num_tokens)), minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    share = counts[counts > 0] / dataset.num_tokens
    return float(-(share * np.log(share)).sum())


def show_document(dataset: IndexedDataset, k: int, tokenizer: Tokenizer | None) -> str:
    """Document k as text, or as ids where there is no tokenizer.

    Raises:
        ValueError: there is no such document, or its ids do not fit the tokenizer.
    """
    if not 0 <= k < dataset.num_documents:
        raise ValueError(f"--document {k}: {dataset.prefix} has documents 0 to {dataset.num_documents - 1}")
    ids = dataset.document(k).tolist()
    head = f"document {k}: {len(ids):,} tokens from {dataset.document_start(k):,}"
    return f"{head}\n{' '.join(map(str, ids)) if tokenizer is None else decode(tokenizer, ids)}"


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids`.

    Raises:
        ValueError: they come from another tokenizer.
    """
    if ids and max(ids) >= tokenizer.vocab_size:
        raise ValueError(
            f"id {max(ids)} is not among the tokenizer's {tokenizer.vocab_size}; give the tokenizer that made the data"
        )
    return tokenizer.decode(ids)


def step_samples(run: Path, config: dict[str, Any], step: int) -> range:
    """The global samples of step `step` (1 is the first): from metrics.jsonl where it has the step, else as planned.

    Raises:
        ValueError: there is no such step.
    """
    if not 1 <= step <= config["train"].get("steps", step):
        raise ValueError(f"--step {step}: the run has steps 1 to {config['train'].get('steps', '…')}")
    consumed = {0: 0}
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):  # the last one may still be on its way
                    record = json.loads(line)
                    consumed[record["step"]] = record["consumed_samples"]
    if step in consumed and step - 1 in consumed:
        return range(consumed[step - 1], consumed[step])
    first, size = BatchPlan(config["train"]["global_batch_size"], **(config["train"].get("ramp") or {}))(step)
    return range(first, first + size)


def show_step(run: Path, step: int, tokenizer: Tokenizer | None) -> str:
    """One line for each sample of the step: where it comes from, and how it begins.

    Raises:
        ValueError: no such run or step, or its data is not there any more.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --run takes the output_dir of a run")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        data, seed = config["data"], config["train"]["seed"]
        sources = [(source["prefix"], source["weight"]) for source in data["sources"]]
        mixture = open_mixture(sources, data["seq_length"], data["split"], "train", seed)
        samples = step_samples(run, config, step)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: lacks or garbles {error}; it is not the resolved config of a run") from None
    lines = [f"step {step}: samples {samples.start:,} to {samples.stop - 1:,}"]
    for i in samples:
        place = mixture.locate(i)
        ranges = " + ".join(f"{lo:,}–{hi - 1:,}" for lo, hi in place.ranges)
        documents = spans(place.documents)
        lines.append(
            f"sample {i}: {sources[place.source][0]} epoch {place.epoch}, documents {documents}, tokens {ranges}"
        )
        if tokenizer is not None:
            text = decode(tokenizer, mixture.sample(i).tolist())
            lines.append("    " + json.dumps(text[:EXCERPT], ensure_ascii=False))
    return "\n".join(lines)


def spans(numbers: tuple[int, ...]) -> str:
    """3, 4, 5, 9 as "3–5, 9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}–{b}" if b > a else f"{a}" for a, b in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", metavar="PREFIX", help="path of a corpus without .bin or .idx")
    parser.add_argument("--document", type=int, metavar="K", help="show document K, counted from 0")
    parser.add_argument("--validate", action="store_true", help="check every entry of the index")
    parser.add_argument("--entropy", action="store_true", help="print the unigram entropy, in nats a token")
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="output_dir of a run (reads config.yaml, metrics.jsonl)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of that run, counted from 1")
    parser.add_argument("--tokenizer", metavar="PATH", help="decode ids to text")
    arguments = parser.parse_args()
    if (arguments.prefix is None) == (arguments.run is None) or (arguments.run is None) != (arguments.step is None):
        parser.error("give a PREFIX, or --run DIR with --step N")
    try:
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        if arguments.run is not None:
            print(show_step(arguments.run, arguments.step, tokenizer))
            return
        dataset = IndexedDataset(arguments.prefix)
        if arguments.document is not None:
            print(show_document(dataset, arguments.document, tokenizer))
            return
        if arguments.entropy:
            print(f"{unigram_entropy(dataset):.4f}")
            return
        print(describe(dataset))
        if arguments.validate:
            dataset.validate()
            print("  valid        every entry of the index has been checked")
    except (ValueError, OSError) as error:
        sys.exit(f"inspect_data: error: {error}")


if __name__ == "__main__":
    main()
