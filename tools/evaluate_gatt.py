"""Measure how long chat models obey an instruction of the first turn: the share of answers that still show it at turns
2, 4, 6 and 20 (the paper, section 3.3).

python tools/evaluate_gatt.py sft=runs/sft gatt=runs/gatt --prompts prompts.jsonl --count 60 --output retention
python tools/evaluate_gatt.py runs/gatt --dialogues long.jsonl --attributes attributes.jsonl --output retention
                 -> retention/{retention.json,retention.png,answers.jsonl} and a table

Each dialogue asks for one attribute: a public figure, a language or a hobby, told by a rule. A file of attributes has
records {"kind": "figure", "name": "Napoleon", "pattern": "emperor|waterloo"}; what has a rule here (without a file
all of it is taken) needs no pattern. The same line under torchrun or srun uses all ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from build_gatt_data import add_model_options, add_sampling_options, at_least, sampling_of, setup_of
from matplotlib.ticker import PercentFormatter

from megallama.files import make_folder, whole, write_whole
from megallama.rlhf.chat_model import is_first_rank, launched, open_chat_model
from megallama.rlhf.ghost.attributes import known_attributes, read_attributes
from megallama.rlhf.ghost.records import PLACES, SYSTEM
from megallama.rlhf.ghost.retention import (
    TURNS,
    Count,
    Trial,
    answers_of,
    count_kinds,
    joined_prompts,
    overflow,
    read_long_talks,
    trials_of,
)
from megallama.runtime.progress import items_progress

Counts = Mapping[str, Mapping[int, Count]]
"""Kind of attribute, or all -> turn -> count."""


def named(text: str) -> tuple[str, str]:
    """("gatt", "runs/gatt") from "gatt=runs/gatt"; a folder alone is named by its own name."""
    name, equals, folder = text.partition("=")
    return (name, folder) if equals else (Path(text).name, text)


def distinct_models(models: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Name -> folder.

    Raises:
        ValueError: two models have one name.
    """
    found = dict(models)
    if len(found) < len(models):
        raise ValueError(f"{len(models)} models share {len(found)} names ({', '.join(found)}); say NAME=FOLDER")
    return found


def table(results: Mapping[str, Counts], turns: Sequence[int]) -> str:
    """Shares, a line for each model and kind."""
    width = max(len(name) for name in results)
    lines = [f"{'':<{width}} {'':<9}" + "".join(f"{f'turn {turn}':>16}" for turn in turns)]
    for name, kinds in results.items():
        for kind, counts in kinds.items():
            cells = []
            for turn in turns:
                kept, asked, _ = found = counts[turn]
                cells.append("—" if found.share is None else f"{found.share:.1%} ({kept}/{asked})")
            lines.append(f"{name:<{width}} {kind:<9}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def as_json(results: Mapping[str, Counts], notes: Mapping[str, str]) -> str:
    models = {
        name: {
            "note": notes[name],
            "retention": {
                kind: {str(turn): found._asdict() | {"share": found.share} for turn, found in counts.items()}
                for kind, counts in kinds.items()
            },
        }
        for name, kinds in results.items()
    }
    return json.dumps({"models": models}, indent=2) + "\n"


def plot(results: Mapping[str, Counts], turns: Sequence[int], path: Path) -> None:
    """Share over turns, a line for each model; the picture appears when it is complete."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, kinds) in enumerate(results.items()):
        points = [(turn, share) for turn in turns if (share := kinds["all"][turn].share) is not None]
        axes.plot([turn for turn, _ in points], [share for _, share in points], "o-", color=f"C{number}", label=name)
    axes.set(xlabel="turn", xticks=list(turns), ylim=(-0.03, 1.03))
    axes.set_title("answers that keep the attribute asked for in turn 1", loc="left", fontsize=10)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def transcript(name: str, trials: Sequence[Trial], answers: Sequence[Sequence[str]]) -> str:
    """A line for each dialogue, to look into."""
    lines = (
        {
            "model": name,
            "kind": trial.attribute.kind,
            "name": trial.attribute.name,
            "users": trial.users,
            "answers": said,
            "kept": [trial.attribute.kept(text) for text in said],
        }
        for trial, said in zip(trials, answers, strict=True)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def evaluate(options: argparse.Namespace, device: torch.device) -> None:
    turns, models = sorted(set(options.turns)), distinct_models(options.models)
    sampling = sampling_of(options)
    attributes = read_attributes(options.attributes) if options.attributes else known_attributes()
    if options.dialogues:
        talks = read_long_talks(options.dialogues, turns[-1])
    else:
        talks = joined_prompts(options.prompts, turns[-1], options.count, options.seed)
    trials = trials_of(talks, attributes)
    make_folder(options.output)
    results: dict[str, Counts] = {}
    notes: dict[str, str] = {}
    transcripts = []

    def ask(name: str, folder: str) -> list[list[str]]:
        model = open_chat_model(folder, setup_of(options), device)
        with items_progress(f"{name}: turns", turns[-1], is_first_rank()) as report:
            answers = answers_of(model, trials, options.place, sampling, options.seed, report)
        notes[name] = overflow(trials, answers, model.longest)
        return answers

    for name, folder in models.items():
        answers = ask(name, folder)  # one model at a time has memory
        results[name] = count_kinds(trials, answers, turns)
        transcripts.append(transcript(name, trials, answers))
    if is_first_rank():
        write_whole(options.output / "answers.jsonl", "".join(transcripts))
        write_whole(options.output / "retention.json", as_json(results, notes))
        plot(results, turns, options.output / "retention.png")
        print(table(results, turns))
        for name, note in notes.items():
            if note:
                print(f"{name}: {note}")
        print(f"wrote {options.output / 'retention.json'}, retention.png and answers.jsonl")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=named, metavar="[NAME=]MODEL", help="a run, checkpoint or HF folder")
    talks = parser.add_mutually_exclusive_group(required=True)
    talks.add_argument("--dialogues", metavar="FILE", help="chat records with as many user turns as the last turn")
    talks.add_argument("--prompts", metavar="FILE", help="prompts, joined at random into dialogues")
    parser.add_argument("--count", type=at_least(1), default=60, help="dialogues made of --prompts (default 60)")
    parser.add_argument("--attributes", type=Path, metavar="FILE", help="what the dialogues ask for, in turn")
    parser.add_argument(
        "--turns", type=at_least(1), nargs="+", default=list(TURNS), metavar="N", help="where to look (2 4 6 20)"
    )
    parser.add_argument(
        "--place", choices=PLACES, default=SYSTEM, help="of the instruction: a system message (default), or before the "
        "first user text",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for table, picture, answers")
    add_model_options(parser)
    add_sampling_options(parser, 0.0, 128)
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        with launched() as device:
            evaluate(options, device)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate_gatt: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
