"""Proof of a conversion: both sides compute the same logits from the same tokens."""

from __future__ import annotations

import gc
import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.formats import HFSource, Source
from megallama.config import Config, TrainConfig
from megallama.data.batch import Batch
from megallama.parallel.pieces import views
from megallama.runtime.mesh import Mesh
from megallama.train.trainer import Trainer, build_stages

TOKENS, SEED = 64, 1234
BOUND = 1e-4
"""Largest accepted difference of two logits in fp32, for each unit of the largest logit."""

OVERHEAD = 1.3
"""Memory of a model that runs, beside its fp32 weights'."""


class Proof(NamedTuple):
    """What both sides computed.

    Attributes:
        difference: largest of two logits.
        scale: largest logit, at least 1.
        where: what ran each side.
    """

    difference: float
    scale: float
    where: tuple[str, str]

    @property
    def holds(self) -> bool:
        return self.difference <= BOUND * self.scale


def refuse_too_big(source: Source) -> None:
    """Stop before hours of work whose proof would not fit into the memory.

    Raises:
        ValueError: gives both numbers.
    """
    needed = OVERHEAD * 4 * sum(map(math.prod, source.shapes.values()))
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:") and needed > (available := int(line.split()[1]) * 1024):
            raise ValueError(
                f"--prove runs each side in fp32, which needs {needed / 1e9:.1f} GB of memory, but only "
                f"{available / 1e9:.1f} GB are free; leave --prove out, or use a larger machine"
            )


def prove(before: Source, after: Source, dtype: torch.dtype | None) -> Proof:
    """Compare two sources of one model.

    Args:
        dtype: to which the conversion rounded, if it did: then both sides start from rounded weights.
    """
    size = min(before.model.vocab_size, after.model.vocab_size)
    length = min(TOKENS, before.model.max_position_embeddings)
    tokens = torch.randint(size, (length,), generator=torch.Generator().manual_seed(SEED))
    logits, where = [], []
    for source in (before, after):
        name, run = ("transformers", their_logits) if _runs_there(source) else ("megallama", our_logits)
        logits.append(run(source, tokens, dtype)[:, :size])
        where.append(name)
        gc.collect()
    scale = max(1.0, float(logits[0].abs().max()))
    return Proof(float((logits[0] - logits[1]).abs().max()), scale, (where[0], where[1]))


def _runs_there(source: Source) -> bool:
    return isinstance(source, HFSource) and find_spec("transformers") is not None


def _round(tensor: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def our_logits(source: Source, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(T,) -> (T, vocabulary) from our own model in this process."""
    config = Config(model=source.model, train=TrainConfig(dtype="float32"))
    stages = build_stages(config, Mesh())
    for stage in stages.values():
        for piece, view in views(stage):
            source.read(piece.name, piece.rect, view)
            _round(view, dtype)
    return Trainer(config, Mesh(), stages, None).infer([Batch.pack([(tokens, tokens)])], lambda out, _: out)[0]


@torch.no_grad()
def their_logits(source: Source, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(T,) -> (T, vocabulary) from transformers."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True)
    for parameter in model.parameters():
        _round(parameter, dtype)
    return model(tokens[None]).logits[0]
