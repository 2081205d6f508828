"""Draw where chat models look in a dialogue: the largest attention over all heads and layers (the paper, figure 10).

python tools/plot_gatt_attention.py without=runs/sft with=runs/gatt --dialogues talks.jsonl --output attention.png

Rows of the maps are the dialogue's tokens, columns what they attend to, the instruction of the first turn on the left;
below, each token's largest attention to the instruction. Neighbouring tokens share a place, which shows their maximum.
A dialogue is a chat record with answers; its system message is the instruction, or --instruction is put there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from build_gatt_data import add_model_options, at_least, setup_of
from evaluate_gatt import distinct_models, named
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from megallama.data import Dialogue, Message, read_dialogues
from megallama.files import make_folder, whole, write_whole
from megallama.rlhf.chat_model import is_first_rank, launched, open_chat_model
from megallama.rlhf.ghost.attention_map import Attention, Section, look, sections
from megallama.rlhf.ghost.records import PLACES, SYSTEM, at_first

PLACES_OF_MAP = 128
"""At most, so that each can be seen."""
COLOURS = {"instruction": "#c0392b", "user": "#4c84c4", "assistant": "#56a37c"}


def instructed(dialogue: Dialogue, instruction: str | None, place: str, turns: int) -> tuple[list[Message], str]:
    """The dialogue's first turns with an instruction, and the instruction.

    Raises:
        ValueError: there is none.
    """
    messages = list(dialogue.messages)
    system = messages.pop(0).content if messages[0].role == "system" else ""
    chosen = instruction or system
    if not chosen.strip():
        raise ValueError(f"{dialogue.origin}: no system message; choose another --record, or give an --instruction")
    users, answers = ([m.content for m in messages if m.role == role][:turns] for role in ("user", "assistant"))
    return at_first(chosen.strip(), users, place).messages(answers), chosen.strip()


def decorate(axes: Axes, parts: Sequence[Section], upright: bool) -> None:
    """Where messages begin, and whose they are."""
    for part in parts:
        axes.axvline(part.first, color="0.5", linewidth=0.5, alpha=0.6)
        if upright:
            axes.axhline(part.first, color="0.5", linewidth=0.5, alpha=0.6)
        axes.plot(
            [part.first, part.last], [1.02, 1.02], color=COLOURS[part.name], linewidth=4, clip_on=False,
            solid_capstyle="butt", transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.tick_params(labelsize=8)


def plot(found: Mapping[str, Attention], parts: Sequence[Section], width: int, path: Path) -> None:
    """The picture appears when it is complete; its format is that of the file name's ending."""
    names, length = list(found), parts[-1].last
    figure, axes = plt.subplot_mosaic(
        [[f"map {name}" for name in names], ["line"] * len(names)],
        figsize=(max(7, 4.6 * len(names)), 7),
        height_ratios=[3, 1.3],
        layout="constrained",
    )
    for number, (name, attention) in enumerate(found.items()):
        side = len(attention.map) * width
        picture = axes[f"map {name}"].imshow(
            attention.map.numpy(),
            extent=(0, side, side, 0),
            norm=PowerNorm(0.5, 0, 1),
            cmap="magma",
            interpolation="nearest",
        )
        axes[f"map {name}"].set(xlim=(0, length), ylim=(length, 0), ylabel="token" if number == 0 else "")
        axes[f"map {name}"].set_title(name, loc="left", fontsize=10, pad=12)
        decorate(axes[f"map {name}"], parts, upright=True)
        peaks = attention.on_watched[parts[0].last :]
        places = [float(part.max()) for part in peaks.split(width)]
        starts = range(parts[0].last, length, width)
        axes["line"].plot(starts, places, color=f"C{number}", linewidth=1.2, label=name)
    figure.colorbar(picture, ax=[axes[f"map {name}"] for name in names], shrink=0.8, label="largest attention")
    axes["line"].set(xlim=(0, length), ylim=(0, None), xlabel="token of the dialogue")
    axes["line"].set_title("largest attention to the instruction", loc="left", fontsize=10, pad=12)
    axes["line"].legend(frameon=False, fontsize=9)
    decorate(axes["line"], parts, upright=False)
    handles = [plt.Line2D([], [], color=colour, linewidth=4) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=9)
    with whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)
    plt.close(figure)


def by_answer(attention: Attention, parts: Sequence[Section]) -> list[float]:
    """Mean over each answer's tokens of their largest attention to the instruction."""
    answers = (part for part in parts if part.name == "assistant")
    return [float(attention.on_watched[part.first : part.last].mean()) for part in answers]


class Seen(NamedTuple):
    ids: list[int]
    parts: list[Section]
    width: int
    attention: Attention


def attention_of(
    folder: str, messages: Sequence[Message], instruction: str, options: argparse.Namespace, device: torch.device
) -> Seen:
    """One model's view of the dialogue; its memory is free again afterwards."""
    model = open_chat_model(folder, setup_of(options), device)
    ids, parts = sections(model.form, messages, instruction)
    width = options.width or -(-len(ids) // PLACES_OF_MAP)
    return Seen(ids, parts, width, look(model.trainer, ids, parts[0][1:], width))


def run(options: argparse.Namespace, device: torch.device) -> None:
    models = distinct_models(options.models)
    if options.output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output {options.output}: end its name in .png, .pdf or .svg")
    dialogues = read_dialogues(options.dialogues)
    if options.record > len(dialogues):
        raise ValueError(f"--record {options.record}, but {options.dialogues} has {len(dialogues)} dialogues")
    dialogue = dialogues[options.record - 1]
    messages, instruction = instructed(dialogue, options.instruction, options.place, options.turns)
    for path in (options.output, *([options.json] if options.json else [])):
        make_folder(path.parent)
    found: dict[str, Attention] = {}
    first_ids: list[int] = []
    for name, folder in models.items():
        seen = attention_of(folder, messages, instruction, options, device)
        if seen.ids != (first_ids := first_ids or seen.ids):
            raise ValueError(f"{folder} has another tokenizer than {options.models[0][1]}: tokens cannot be compared")
        found[name] = seen.attention
    if is_first_rank():
        plot(found, seen.parts, seen.width, options.output)
        means = {name: by_answer(attention, seen.parts) for name, attention in found.items()}
        for name, values in means.items():
            print(f"{name}: attention to the instruction in each answer: {' '.join(f'{x:.3f}' for x in values)}")
        if options.json is not None:
            told = {
                "sections": [part._asdict() for part in seen.parts],
                "models": {
                    name: {"answers": means[name], "tokens": attention.on_watched.tolist()}
                    for name, attention in found.items()
                },
            }
            write_whole(options.json, json.dumps(told) + "\n")
        print(f"wrote {options.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=named, metavar="[NAME=]MODEL", help="a run, checkpoint or HF folder")
    parser.add_argument("--dialogues", required=True, metavar="FILE", help="chat records")
    parser.add_argument("--record", type=at_least(1), default=1, help="which of them (default 1, the first)")
    parser.add_argument("--turns", type=at_least(1), default=20, help="most turns of it (default 20)")
    parser.add_argument("--instruction", help="in place of the record's system message")
    parser.add_argument(
        "--place", choices=PLACES, default=SYSTEM, help="of the instruction: a system message (default), or before the "
        "first user text",
    )  # fmt: skip
    parser.add_argument("--width", type=at_least(1), help=f"tokens a place (default: {PLACES_OF_MAP} places at most)")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="picture (default attention.png)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the line's numbers as JSON")
    add_model_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        with launched() as device:
            run(options, device)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_gatt_attention: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
