"""Pretraining: next-token prediction on tokenised corpora."""

from __future__ import annotations

from megallama.config import Config
from megallama.data import check_vocabulary, load_tokenizer, open_mixture
from megallama.data.loader import CorpusLoader
from megallama.runtime.mesh import Mesh
from megallama.train.loop import Task
from megallama.train.run import run_stage
from megallama.train.trainer import NextToken, build_trainer


def run(config: Config) -> int:
    """Pretrain as `config` says; returns the exit code. Every rank of the launch calls it."""
    return run_stage(config, lambda config, mesh: (config, pretraining_task(config, mesh)), build_trainer)


def pretraining_task(config: Config, mesh: Mesh) -> Task:
    """Open the corpora; every rank opens them itself, which takes milliseconds.

    Raises:
        ValueError: no sources, a damaged or too short one, or a tokenizer that does not fit the model.
    """
    data, model = config.data, config.model
    if config.train.steps < 1:
        raise ValueError("train.steps=0 leaves the number of steps to the epochs of sft and reward; pretrain needs it")
    if not data.sources:
        raise ValueError(
            "data.sources is empty: name at least one {prefix: …, weight: …} made by tools/preprocess_data.py"
        )
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    check_vocabulary([source.prefix for source in data.sources], model.vocab_size, tokenizer)
    fingerprints = {"tokenizer": tokenizer.fingerprint()} if tokenizer else {}

    def loader(part: str) -> CorpusLoader:
        sources = [(source.prefix, source.weight) for source in data.sources]
        mixture = open_mixture(sources, data.seq_length, data.split, part, config.train.seed)
        return CorpusLoader(mixture, data.mask_documents, mesh.tp.size, model.vocab_size)

    train = loader("train")
    fingerprints |= {f"data {corpus.dataset.prefix}": corpus.dataset.fingerprint() for corpus in train.mixture.corpora}
    validates = data.split > 0 and config.train.valid_interval > 0
    return Task(NextToken(model.vocab_size, mesh.tp), train, loader("valid") if validates else None, fingerprints)
