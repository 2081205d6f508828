"""A model that ends its answers soon, dialogues of several turns, and a way to run the tools of ghost attention."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from alignment_world import MODEL, RandomSource, write_records

from megallama.checkpoint.formats.native import write_store
from megallama.config import ModelConfig
from megallama.model.canonical import EMBEDDING, HEAD
from megallama.parallel.pieces import Rect
from megallama.rlhf.chat_model import ChatModel, Setup, open_chat_model

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
EOS = 2
TURNS = 3
WORDS = ("red", "green", "blue", "grey", "pink", "gold")


class BriefSource(RandomSource):
    """Every hidden state leans to one direction, and the row of EOS in the head as well: answers have a few tokens."""

    def read(self, name: str, rect: Rect, out: torch.Tensor) -> None:
        super().read(name, rect, out)
        if name == EMBEDDING:
            out.add_(1.0)
        if name == HEAD and rect.r0 <= EOS < rect.r1:
            out[EOS - rect.r0].fill_(0.16)


class GhostWorld(NamedTuple):
    root: Path
    tokenizer: Path
    model: Path
    dialogues: Path
    lists: dict[str, Path]

    def setup(self, tp: int = 1, pp: int = 1, dtype: str = "float32") -> Setup:
        return Setup(str(self.tokenizer), None, tp, pp, dtype, rows=5)

    def open(self, tp: int = 1, pp: int = 1, dtype: str = "float32", folder: Path | None = None) -> ChatModel:
        return open_chat_model(str(folder or self.model), self.setup(tp, pp, dtype), torch.device("cpu"))


def shape(context: int) -> ModelConfig:
    return replace(MODEL, max_position_embeddings=context)


def make_ghost_world(root: Path, context: int = 512) -> GhostWorld:
    import sentencepiece

    out = io.BytesIO()
    text = [
        f"Say the word {a} and {b}. [INST] <<SYS>>\nAlways act as\n<</SYS>>\n\n [/INST]" for a in WORDS for b in WORDS
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, vocab_size=MODEL.vocab_size, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    lists = {kind: root / f"{kind}.txt" for kind in ("hobby", "language", "figure")}
    world = GhostWorld(root, root / "small.model", root / "brief", root / "talks.jsonl", lists)
    world.tokenizer.write_bytes(out.getvalue())
    write_store(BriefSource(shape(context)), world.model)
    write_records(world.dialogues, [talk(n) for n in range(14)])
    for path, entries in zip(lists.values(), ("Tennis\nChess\n", "French\nGerman\n", "Napoleon\n"), strict=True):
        path.write_text(entries)
    return world


def talk(n: int) -> dict:
    messages = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Say {WORDS[(n + turn) % len(WORDS)]} {turn}."})
        messages.append({"role": "assistant", "content": "An answer that nobody uses."})
    return {"id": f"talk{n}", "messages": messages}


def run_tool(name: str, *arguments: object) -> None:
    """tools/NAME.py in this process; SystemExit where it fails."""
    sys.path.insert(0, str(TOOLS))
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        importlib.import_module(name).main()
    finally:
        sys.argv = before
        sys.path.remove(str(TOOLS))
