"""Verify a checkpoint, list its tensors, or measure how far two checkpoints are apart.

python tools/check_checkpoint.py runs/my_run/checkpoints/step_00000500    every byte of a checkpoint
python tools/check_checkpoint.py runs/my_run                              all of a run's, and what it would resume from
python tools/check_checkpoint.py llama2-7b-hf --list                      … and a table of its tensors
python tools/check_checkpoint.py --diff runs/my_run llama2-7b-hf          drift of each tensor from A to B
python tools/check_checkpoint.py --diff A B --tolerance 1e-3              … exit 1 where any |a - b| is larger

A megallama checkpoint is verified: the manifest's checksum and fields, that every element is stored once, the size of
every file, the CRC32 of every chunk, what lies there beside it. Formats of others (hf, meta, megatron, epfl) have no
checksums: names and shapes are checked, and all values of the model read (of copies the first). NaN and infinite values
are faults in any format.

damaged: a reader refuses it, and a run falls back to an older checkpoint. fault: a reader would take it, but should
not. note: no fault. Exit status: 0 all well; 1 damage, a fault, unlike models, or over --tolerance. A and B may be of
different formats and layouts; of a run the newest checkpoint is taken. Values are compared as fp64.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal

from megallama.checkpoint.check import Survey, survey
from megallama.checkpoint.checkpointer import LEAVING, UNFINISHED, checkpoint_folders
from megallama.checkpoint.drift import Comparison, Drift, Side, open_side, relative
from megallama.checkpoint.formats.convert import SOURCES
from megallama.checkpoint.store import MANIFEST
from megallama.config import ModelConfig
from megallama.runtime.progress import bytes_progress

TOP = 20


class Run(NamedTuple):
    """Where a run's checkpoints lie, and those, newest first."""

    root: Path
    folders: list[Path]

    @property
    def leftovers(self) -> list[Path]:
        return sorted(self.root.glob(f"step_*{UNFINISHED}"))


def run_in(folder: Path) -> Run | None:
    """The run whose folder, or whose checkpoints' folder, this is; None where it is neither.

    Raises:
        ValueError: there are only beginnings of checkpoints.
    """
    if (folder / MANIFEST).exists():
        return None
    root = next((root for root in (folder / "checkpoints", folder) if any(root.glob("step_*"))), None)
    if root is None:
        return None
    run = Run(root, checkpoint_folders(root))
    if not run.folders:
        said = "; ".join(f"{path.name} is {leftover(path)}" for path in run.leftovers)
        raise ValueError(f"{root} holds no checkpoint{': ' if said else ''}{said}")
    return run


def leftover(path: Path) -> str:
    doing = "removal" if path.name.endswith(LEAVING) else "save"
    return f"a {doing} that goes on right now, or was cut off (the run's next start then removes it)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="CHECKPOINT", help="a checkpoint, a run, or its checkpoints folder"
    )
    parser.add_argument("--list", action="store_true", help="print name, shape, dtype and rms of every tensor")
    parser.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"), help="compare two checkpoints")
    parser.add_argument("--top", type=int, metavar="N", help=f"tensors that --diff shows, largest drift first ({TOP})")
    parser.add_argument("--tolerance", type=float, metavar="T", help="largest |a - b| with which --diff exits 0")
    parser.add_argument(
        "--format",
        choices=SOURCES,
        action="append",
        default=[],
        help="format, given twice for A and B of two formats (recognised from what lies in the folder)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if (arguments.folder is None) == (arguments.diff is None):
        parser.error("give a CHECKPOINT, or --diff A B")
    folders = arguments.diff or [arguments.folder]
    if len(arguments.format) > len(folders):
        parser.error(f"--format is given {len(arguments.format)} times for {count(len(folders), 'checkpoint')}")
    for name in ("top", "tolerance"):
        value = getattr(arguments, name)
        if value is not None and arguments.diff is None:
            parser.error(f"--{name} means nothing without --diff")
        if value is not None and not value >= 0:
            parser.error(f"--{name} {value} must not be negative")
    if arguments.list and arguments.diff:
        parser.error("--list means nothing with --diff")
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"check_checkpoint: error: {folder}: no such folder")
    return arguments


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def table(sides: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as needed; `sides` aligns each, < or >."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    columns = list(zip(sides, widths, strict=True))
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True))
        for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def plain(value: float | None) -> float | None:
    """A number that JSON has."""
    return value if value is not None and math.isfinite(value) else None


def model_words(model: ModelConfig) -> str:
    tied = ", tied embeddings" if model.tie_word_embeddings else ""
    return (
        f"{count(model.num_hidden_layers, 'layer')}, hidden size {model.hidden_size}, feed-forward "
        f"{model.intermediate_size}, {model.num_attention_heads} heads, {model.num_key_value_heads} K/V heads, "
        f"vocabulary {model.vocab_size}{tied}"
    )


def parameters(found: Survey) -> int:
    return sum(row.elements for row in found.rows.values())


def describe(found: Survey, seconds: float) -> str:
    """The findings, then what it is."""
    faults = len(found.damage) + len(found.faults)
    lines = [f"{found.folder}: {count(faults, 'fault') if faults else 'valid'}"]
    kinds = (("damaged", found.damage), ("fault", found.faults), ("note", found.notes))
    lines += [f"  {kind}: {text}" for kind, texts in kinds for text in texts]
    if not found.streams:
        return "\n".join(lines)
    what = [f"{found.form} checkpoint"]
    if found.about:
        what = [
            f"megallama checkpoint, version {found.about['version']}, step {found.about['step']:,}, "
            f"{count(found.about['consumed_samples'], 'consumed sample')}"
        ]
    if found.model:
        what.append(model_words(found.model))
    what.append(f"{parameters(found):,} parameters")
    lines.append(f"  {'; '.join(what)}")
    rate = found.nbytes / max(seconds, 1e-9) / 1e9
    unverified = "" if found.form == "megallama" else "; the format has no checksums to verify"
    lines.append(
        f"  {', '.join(found.states)} in {count(found.files, 'file')}, {decimal(found.size)}, "
        f"read in {seconds:.1f} s, {rate:.2f} GB/s{unverified}"
    )
    return "\n".join(lines)


def listing(found: Survey) -> str:
    """One line a tensor."""
    head = ["name", "shape", "dtype", "elements", *(f"rms of {state}" for state in found.states)]
    rows = []
    for row in found.rows.values():
        values = [row.rms.get(state) for state in found.states]
        rms = ["damaged" if value is None else f"{value:.4e}" for value in values]
        rows.append([row.name, " x ".join(map(str, row.shape)), row.dtype, f"{row.elements:,}", *rms])
    return table("<><>" + ">" * len(found.states), head, rows)


def as_object(found: Survey, seconds: float) -> dict[str, Any]:
    """All of it for machines."""
    tensors = [
        {
            "name": row.name,
            "shape": row.shape,
            "dtype": row.dtype,
            "elements": row.elements,
            "rms": {state: plain(row.rms.get(state)) for state in found.states},
        }
        for row in found.rows.values()
    ]
    return {
        "folder": str(found.folder),
        "format": found.form,
        "valid": found.valid,
        "damage": found.damage,
        "faults": found.faults,
        "notes": found.notes,
        **found.about,
        "model": asdict(found.model) if found.model else None,
        "parameters": parameters(found),
        "states": found.states,
        "files": found.files,
        "bytes": found.size,
        "seconds": seconds,
        "tensors": tensors,
    }


def check(arguments: argparse.Namespace) -> str:
    """Check a checkpoint or all of a run; what is wrong in a word, or nothing."""
    form = arguments.format[0] if arguments.format else None
    run = run_in(arguments.folder) if form in (None, "megallama") else None
    objects, faulty, resumed = [], [], ""
    for folder in run.folders if run else [arguments.folder]:
        found = survey(folder, form)
        started = time.monotonic()
        with bytes_progress(folder.name, found.nbytes) as report:
            found.read(report)
        seconds = time.monotonic() - started
        resumed = resumed or (folder.name if found.resumable else "")
        if not found.valid:
            faulty.append(folder.name)
        if arguments.json:
            objects.append(as_object(found, seconds))
            continue
        if arguments.list and found.rows:
            print(listing(found))
        print(describe(found, seconds), flush=True)
    if arguments.json:
        left = [path.name for path in run.leftovers] if run else []
        print(json.dumps({"checkpoints": objects, "resumes_from": resumed or None, "leftovers": left}, allow_nan=False))
    elif run:
        for path in run.leftovers:
            print(f"{path}: {leftover(path)}")
        print(f"the run resumes from {resumed}" if resumed else "the run has nothing that it could resume from")
    return f"faults in {', '.join(faulty)}" if faulty else ""


def side_words(name: str, side: Side) -> str:
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in side.source.dtypes.values()})
    return f"{name}  {side.source.folder}  ({side.form}, {', '.join(dtypes)}; {', '.join(side.states)})"


def drift_lines(drifts: Sequence[Drift], equal: str, top: int) -> list[str]:
    """The largest drifts, and all together; the others are `equal`."""
    apart = [drift for drift in drifts if drift.differing]
    lines = []
    if apart and top:
        rows = [
            [
                f"{relative(drift):.3e}",
                f"{drift.largest:.3e}",
                f"({', '.join(map(str, drift.at))})",
                f"{drift.differing:,} of {drift.elements:,}",
                f"{drift.state} of {drift.name}",
            ]
            for drift in apart[:top]
        ]
        lines.append(table(">>>><", ["rms(a-b)/rms(a)", "max |a-b|", "at", "differing", "tensor"], rows))
    if len(apart) > top:
        lines.append(f"… and {len(apart) - top:,} more that differ (--top {len(apart)} shows all)")
    if not apart:
        lines.append(f"all {count(len(drifts), 'tensor')} {equal}")
        return lines
    lines.append(f"{len(apart):,} of {len(drifts):,} differ, {len(drifts) - len(apart):,} {equal}")
    for state in dict.fromkeys(drift.state for drift in drifts):
        held = [drift for drift in drifts if drift.state == state]
        largest = max(drift.largest for drift in held)
        lines.append(f"{state}: rms(a-b)/rms(a) {relative(*held):.3e}, max |a-b| {largest:.3e}")
    return lines


def diff(arguments: argparse.Namespace) -> str:
    """Compare two checkpoints; what is wrong in a word, or nothing."""
    formats = (arguments.format or [None]) * 2

    def note(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    a, b = (open_side(folder, form, note) for folder, form in zip(arguments.diff, formats, strict=False))
    pair = Comparison(a, b)
    with bytes_progress("comparing", pair.nbytes) as report:
        drifts = pair.read(report)
    if arguments.json:
        tensors = [
            {
                "state": drift.state,
                "name": drift.name,
                "elements": drift.elements,
                "differing": drift.differing,
                "max": plain(drift.largest),
                "at": drift.at if drift.differing else None,
                "relative": plain(relative(drift)),
            }
            for drift in drifts
        ]
        sides = {name: str(side.source.folder) for name, side in (("a", a), ("b", b))}
        print(json.dumps({**sides, "unlike": pair.unlike, "tensors": tensors}, allow_nan=False))
    else:
        unlike = [f"unlike: {text}" for text in pair.unlike]
        top = TOP if arguments.top is None else arguments.top
        equal = "equal bitwise" if a.source.dtypes == b.source.dtypes else "equal in value"
        print("\n".join([side_words("A", a), side_words("B", b), *unlike, *drift_lines(drifts, equal, top)]))
    if pair.unlike:
        return f"A and B are different models: {pair.unlike[0]}"
    worst = max(drifts, key=lambda drift: drift.largest)
    if arguments.tolerance is not None and worst.largest > arguments.tolerance:
        return (
            f"max |a-b| is {worst.largest:.3e} in {worst.state} of {worst.name}, over --tolerance {arguments.tolerance}"
        )
    return ""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)  # the threads are over tensors
    try:
        wrong = diff(arguments) if arguments.diff else check(arguments)
    except (ValueError, OSError) as error:
        wrong = str(error)
    except KeyboardInterrupt:
        print("check_checkpoint: stopped", file=sys.stderr)
        sys.exit(130)
    if wrong:
        sys.exit(f"check_checkpoint: error: {wrong}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends quietly
    main()
