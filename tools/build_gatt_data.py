"""Make records for ghost attention: dialogues whose first turn gives an instruction that holds to the end.

python tools/build_gatt_data.py lists --model runs/rlhf --output lists
                 -> lists/{hobbies,languages,figures}.txt: what the model itself knows; a line each, to look through
python tools/build_gatt_data.py dialogues --model runs/rlhf --dialogues multi_turn.jsonl --output gatt \\
    --hobbies lists/hobbies.txt --languages lists/languages.txt --figures lists/figures.txt
                 -> gatt/gatt.jsonl: chat records for `megallama sft`

Of the dialogues only what the user says is used. The model answers each turn with an instruction attached to it, drawn
from the lists; the records show the instruction in the first turn alone, half of them shortened ("Figure: Napoleon."),
and train nothing but the last answer. A killed run goes on where it was; the same line under torchrun or srun uses all
ranks. An answer that says nothing or is cut off ends its dialogue before that turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tool runs from a checkout, installed or not
from megallama.files import make_folder, write_whole  # noqa: E402
from megallama.inference.sampling import Sampling  # noqa: E402
from megallama.rlhf.chat_model import (  # noqa: E402
    ChatModel,
    Setup,
    is_first_rank,
    launched,
    open_chat_model,
)
from megallama.rlhf.ghost.constraints import ask, read_list  # noqa: E402
from megallama.rlhf.ghost.records import LEAST_TURNS, PLACES, SYSTEM, Recipe, build, check_room, read_talks  # noqa: E402
from megallama.train.models import weights_fingerprint  # noqa: E402
from megallama.train.run import run_folder  # noqa: E402
from megallama.train.sources import digest  # noqa: E402

FILES = {"hobby": "hobbies", "language": "languages", "figure": "figures"}
"""Kind of constraint -> its option, and the name of its file."""


def at_least(floor: int) -> Callable[[str], int]:
    """A type for argparse."""

    def number(text: str) -> int:
        if (value := int(text)) < floor:
            raise argparse.ArgumentTypeError(f"{value} must be at least {floor}")
        return value

    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every tool that runs chat models."""
    parser.add_argument("--tokenizer", help="tokenizer of the model (default: the one in its folder)")
    parser.add_argument("--separator", help="chat.separator of its training (default: none)")
    parser.add_argument("--tp", type=at_least(1), default=1, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--pp", type=at_least(1), default=1, help="pipeline ranks (default 1); others are replicas")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float64"), default="bfloat16")


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float, max_new_tokens: int) -> None:
    parser.add_argument("--rows", type=at_least(1), default=64, help="dialogues answered together on a replica (64)")
    parser.add_argument("--temperature", type=float, default=temperature, help=f"0 = greedy (default {temperature})")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the tokens' probability (default 1)")
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=max_new_tokens, help=f"longest answer ({max_new_tokens})"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="draws everything (default 0)")


def setup_of(options: argparse.Namespace) -> Setup:
    setup = Setup(options.tokenizer, options.separator, options.tp, options.pp, options.dtype)
    return replace(setup, rows=options.rows) if "rows" in options else setup


def sampling_of(options: argparse.Namespace) -> Sampling:
    return Sampling(options.max_new_tokens, options.temperature, top_p=options.top_p)


def make_lists(options: argparse.Namespace, device: torch.device) -> None:
    """Ask the model for each list; nothing is written before it has given all."""
    folder, sampling = options.output, sampling_of(options)
    paths = {kind: folder / f"{name}.txt" for kind, name in FILES.items()}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} exists; choose another --output, or remove it first")
    make_folder(folder)
    model = open_chat_model(options.model, setup_of(options), device)
    found = {kind: ask(model, kind, options.count, options.times, sampling, options.seed) for kind in paths}
    if is_first_rank():
        for kind, path in paths.items():
            write_whole(path, "".join(f"{entry}\n" for entry in found[kind]))
            print(f"{path}: {len(found[kind])} {FILES[kind]}")


def make_dialogues(options: argparse.Namespace, device: torch.device) -> None:
    given = {kind: getattr(options, name) for kind, name in FILES.items() if getattr(options, name)}
    if not given:
        raise ValueError("no list of constraints; give at least one of --hobbies, --languages, --figures")
    recipe = Recipe(sampling_of(options), options.seed, options.place, options.part)
    lists = {kind: read_list(path) for kind, path in given.items()}
    talks, too_short = read_talks(options.dialogues, options.turns)
    model = open_chat_model(options.model, setup_of(options), device)
    check_room(talks, model.form, model.longest, lists, recipe)
    settings = settings_of(options, model) | {FILES[kind]: entries for kind, entries in lists.items()}
    with run_folder(replace(model.trainer.config, output_dir=str(options.output)), model.mesh):
        made = build(model, talks, lists, recipe, options.output, settings)
    if made is not None:
        print(f"{made.path}: {made.records} records, {made.short_instructions} with a shortened instruction")
        for number, what in (
            (too_short, f"dialogues have fewer than {LEAST_TURNS} user turns: not used"),
            (
                made.shortened,
                "records end before the last turn: its answer said nothing or was cut off",
            ),
            (made.lost, "dialogues ended before their second answer: no record"),
        ):
            if number:
                print(f"{number} {what}")


def settings_of(options: argparse.Namespace, model: ChatModel) -> dict[str, Any]:
    """What the records depend on, beside the lists."""
    names = ("turns", "seed", "place", "part", "temperature", "top_p", "max_new_tokens", "dtype")
    return {
        "dialogues": digest(options.dialogues),
        "model": weights_fingerprint(model.folder),
        "format": model.form.fingerprint(),
        **{name: getattr(options, name) for name in names},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{lists,dialogues}")
    lists = commands.add_parser("lists", help="ask the model for hobbies, languages and public figures")
    lists.set_defaults(run=make_lists)
    lists.add_argument("--model", required=True, help="a run, a checkpoint or a Hugging Face folder")
    lists.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the lists")
    lists.add_argument("--count", type=at_least(1), default=50, help="entries asked for (default 50)")
    lists.add_argument("--times", type=at_least(1), default=4, help="how often each list is asked for (default 4)")
    add_model_options(lists)
    add_sampling_options(lists, 1.0, 1024)
    dialogues = commands.add_parser("dialogues", help="make the records")
    dialogues.set_defaults(run=make_dialogues)
    dialogues.add_argument("--model", required=True, help="the newest chat model: a run, checkpoint or HF folder")
    dialogues.add_argument("--dialogues", required=True, metavar="FILE", help="chat records of several turns")
    for kind, name in FILES.items():
        dialogues.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"a {kind} a line")
    dialogues.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for parts and gatt.jsonl")
    dialogues.add_argument(
        "--turns", type=at_least(LEAST_TURNS), default=8, help="most user turns taken of a dialogue (default 8)"
    )
    dialogues.add_argument(
        "--place", choices=PLACES, default=SYSTEM, help="of the instruction in records: a system message (default), "
        "or before the first user text",
    )  # fmt: skip
    dialogues.add_argument("--part", type=at_least(1), default=256, help="dialogues between two saves (default 256)")
    add_model_options(dialogues)
    add_sampling_options(dialogues, 1.0, 256)
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        with launched() as device:
            options.run(options, device)
    except (ValueError, OSError) as error:
        sys.exit(f"build_gatt_data: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
