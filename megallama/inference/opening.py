"""What `generate` and `chat` start from: a model's weights, the layout that generates with them, and the tokenizer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from megallama.checkpoint.formats import Source
from megallama.checkpoint.formats.tokenizer_files import fitting_tokenizer
from megallama.config import LM, Config
from megallama.data import Tokenizer
from megallama.inference.consolidate import generation_config
from megallama.inference.sampling import Sampling
from megallama.runtime.launch import resolve
from megallama.train.models import adopt, known_tokenizer, open_weights


class Opened(NamedTuple):
    """A model that is ready to be loaded.

    Attributes:
        config: with the model's shape, in the layout for generation: replicas of tp ranks, no pipeline.
    """

    config: Config
    source: Source
    tokenizer: Tokenizer


def open_model(config: Config) -> Opened:
    """Open generate.model, or the run's newest checkpoint; reads headers only. Every rank of the launch calls it.

    Raises:
        ValueError: there is no such model, it has no LM head, no tokenizer is known, or the ranks cannot hold it.
    """
    asked = config.generate
    source = open_weights(asked.model or config.output_dir)
    if source.model.head != LM:
        raise ValueError(f"{source.folder} is a reward model, which scores texts and writes none; name another model")
    config = adopt(config, source.model, source.folder)
    tp, world = asked.tp or config.parallel.tp, resolve(os.environ).size
    config = replace(
        generation_config(config, tp),
        data=replace(config.data, seq_length=min(config.data.seq_length, config.model.max_position_embeddings)),
        # Shapes change from pass to pass, and nothing of training's batches is left.
        train=replace(
            config.train, compile=False, micro_batch_size=1, global_batch_size=max(1, world // tp), ramp=None
        ),
    )
    try:
        config.validate(world)
    except ValueError as error:
        if not asked.tp:
            raise
        raise ValueError(f"generate.tp={tp}: {error}") from None
    return Opened(config, source, _tokenizer(config, source))


def _tokenizer(config: Config, source: Source) -> Tokenizer:
    path = Path(config.data.tokenizer) if config.data.tokenizer else known_tokenizer(source.folder)
    if path is None:
        raise ValueError(
            f"data.tokenizer is empty, and {source.folder} has no tokenizer: name the one that it was trained with"
        )
    return fitting_tokenizer(path, source.model)


def sampling_of(config: Config) -> Sampling:
    """How generate.* asks for tokens to be chosen."""
    asked = config.generate
    return Sampling(asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p, asked.stop)
