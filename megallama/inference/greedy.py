"""Greedy continuation without a cache: every new token is a forward pass through the training pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint import Checkpointer, Store
from megallama.config import Config
from megallama.data.batch import IGNORE, Batch
from megallama.data.tokenizer import load_tokenizer
from megallama.parallel.collectives import all_gather
from megallama.parallel.pieces import Piece, views
from megallama.runtime.mesh import Axis
from megallama.train.pretrain import on_mesh
from megallama.train.trainer import Trainer, build_stages


@dataclass(frozen=True)
class LargestLogit:
    """Id of the largest logit after the last token of each of the first `rows` spans, over the shards of `tp`."""

    rows: int
    vocab: int
    tp: Axis

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits (T, ceil(vocab / tp)) -> (rows,) int64. Equal logits give the smallest id."""
        first = self.tp.rank * logits.shape[1]
        ends = torch.tensor(batch.bounds[1 : self.rows + 1], device=logits.device) - 1
        own = logits[ends].double()
        own[:, max(0, self.vocab - first) :] = float("-inf")
        value, index = own.max(1)
        shards = all_gather(torch.stack((value, (index + first).double()))[None], self.tp)
        winner = shards[:, 0].argmax(0)
        return shards[winner, 1, torch.arange(self.rows, device=logits.device)].long()


def continue_greedily(trainer: Trainer, prompts: list[list[int]], new_tokens: int, stop: int | None) -> list[list[int]]:
    """Each prompt's ids with up to `new_tokens` more; a row ends at the id `stop`. Collective over a replica."""
    rows, tp = [list(p) for p in prompts], trainer.mesh.tp
    model = trainer.config.model
    for _ in range(new_tokens):
        live = [
            r
            for r, prompt in zip(rows, prompts, strict=True)
            if (len(r) == len(prompt) or r[-1] != stop) and len(r) < model.max_position_embeddings
        ]
        if not live:
            break
        tokens = [torch.tensor(r) for r in live]
        batch = Batch.pack([(t, torch.full_like(t, IGNORE)) for t in tokens], tp.size)
        (ids,) = trainer.infer([batch], LargestLogit(len(live), model.vocab_size, tp))
        for row, token in zip(live, ids.tolist(), strict=True):
            row.append(token)
    return rows


def run(config: Config) -> int:
    """Print the continuations of generate.prompts by the run's newest checkpoint. Every rank of the launch calls it."""
    with on_mesh(config, lambda: "generate") as mesh:
        if not config.data.tokenizer:
            raise ValueError("data.tokenizer is empty: name the tokenizer model that the run was trained with")
        tokenizer = load_tokenizer(config.data.tokenizer)
        stages = build_stages(config, mesh)
        checkpoints = Checkpointer(Path(config.output_dir) / "checkpoints", mesh, config.model)

        def slots(_: Store) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
            return ((piece, {"weight": view}) for stage in stages.values() for piece, view in views(stage))

        skipped: list[str] = []
        found = checkpoints.load_newest(slots, skipped.append)
        if mesh.world.rank == 0:
            print(*skipped, sep="\n", end="", file=sys.stderr)
        if found is None:
            raise ValueError(f"{checkpoints.root} holds no checkpoint: train first, or set output_dir")
        before = [] if tokenizer.eos is None else [tokenizer.eos]  # in training, a document follows the end of another
        prompts = [[*before, *tokenizer.encode(text)] for text in config.generate.prompts]
        rows = continue_greedily(
            Trainer(config, mesh, stages, None), prompts, config.generate.max_new_tokens, tokenizer.eos
        )
        if mesh.world.rank == 0:
            for text, prompt, row in zip(config.generate.prompts, prompts, rows, strict=True):
                print(f"{text!r} → {tokenizer.decode(row[len(prompt) :])!r}")
    return 0
