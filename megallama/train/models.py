"""Models from weights that exist: of a run, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megallama.checkpoint.formats import HFSource, Source, StoreSource
from megallama.checkpoint.formats.hf import CONFIG
from megallama.checkpoint.formats.tokenizer_files import tokenizer_in
from megallama.checkpoint.store import MANIFEST
from megallama.config import SCALAR, Config, ModelConfig
from megallama.model.canonical import SCORE, canonical_shapes
from megallama.model.initial import RandomWeights
from megallama.parallel.pieces import Rect, views
from megallama.runtime.exchange import everyones
from megallama.runtime.launch import TIMEOUT
from megallama.runtime.mesh import Mesh, build_mesh
from megallama.train.trainer import Trainer, build_stages

KEPT = ("preset", "max_position_embeddings", "initializer_range")
"""Keys of a model that a run may set otherwise than the weights it starts from."""


def open_weights(path: str, note: Callable[[str], None] = lambda line: None) -> Source:
    """The newest weights of a run, those of a checkpoint's folder, or a Hugging Face model.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a run, a checkpoint or a Hugging Face model")
    return HFSource(folder) if (folder / CONFIG).is_file() else StoreSource(folder, note)


def weights_fingerprint(folder: Path) -> str:
    """Tells models apart without reading their weights: a checkpoint's manifest has a checksum of every part of them;
    of other folders, names and sizes of the files of tensors."""
    manifest = folder / MANIFEST
    files = sorted(folder.glob("*.safetensors"))
    told = manifest.read_bytes() if manifest.is_file() else repr([(f.name, f.stat().st_size) for f in files]).encode()
    return hashlib.sha256(told).hexdigest()


def identity(source: Source) -> str:
    """Which weights: their folder, which names the step, and what tells them from others that lay there."""
    return f"{source.folder.resolve()} ({weights_fingerprint(source.folder)[:16]})"


class ScoredSource:
    """The trunk of a language model under a new scalar head (the paper, section 3.2.2): its weights are random, the
    same in every layout."""

    def __init__(self, source: Source, seed: int):
        self._source = source
        self.folder, self.model = source.folder, replace(source.model, head=SCALAR)
        self.shapes = canonical_shapes(self.model)
        self._head = RandomWeights(self.model, seed)

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {**self._source.dtypes, SCORE: torch.float32}

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """As the trunk's source, or the new head."""
        (self._head if name == SCORE else self._source).read(name, rect, out)


def scored(source: Source, seed: int) -> Source:
    """The same weights with a scalar head: their own, or a new one."""
    return source if source.model.head == SCALAR else ScoredSource(source, seed)


def adopt(config: Config, model: ModelConfig, where: Path) -> Config:
    """The configuration with the shape of the weights at `where`; keys of model.* may be left at their defaults.

    Raises:
        ValueError: a key is set to something else than what the weights have.
    """
    plain, given = ModelConfig(), config.model
    chosen = {key: getattr(given, key) for key in KEPT if getattr(given, key) != getattr(plain, key)}
    wrong = [
        f"{f.name} is {getattr(model, f.name)} there, {getattr(given, f.name)} here"
        for f in fields(ModelConfig)
        if f.name not in (*KEPT, "head")
        and getattr(given, f.name) not in (getattr(model, f.name), getattr(plain, f.name))
    ]
    if wrong:
        raise ValueError(f"{where} holds another model: {', '.join(wrong)}; leave model.* out, weights bring it along")
    return replace(config, model=replace(model, **chosen))


def without_batches(config: Config, world: int) -> Config:
    """The configuration with a global batch that every layout of the ranks accepts: nothing is trained."""
    size = config.train.micro_batch_size * world
    return replace(config, train=replace(config.train, global_batch_size=size, ramp=None, compile=False))


def known_tokenizer(folder: Path) -> Path | None:
    """The tokenizer in a model's folder, else the one that the run of a checkpoint was given; None where neither is."""
    if own := tokenizer_in(folder):
        return own
    settings = folder.parent.parent / "config.yaml"
    if not settings.is_file():
        return None
    named = ((yaml.safe_load(settings.read_text(encoding="utf-8")) or {}).get("data") or {}).get("tokenizer")
    return Path(named) if named and Path(named).exists() else None


def mesh_for(model: ModelConfig, mesh: Mesh) -> Mesh:
    """The mesh with the groups that `model` needs: those for copies of K/V heads and of a tied embedding depend on it.
    Collective where new ones are made."""
    copies = max(1, mesh.tp.size // model.num_key_value_heads)
    if copies == mesh.kv.size and (not model.tied or mesh.pp.size == 1):
        return mesh
    return build_mesh(mesh.tp.size, mesh.pp.size, model.num_key_value_heads, model.tied, mesh.device, TIMEOUT)


def agreed(source: Source, mesh: Mesh) -> Source:
    """The source itself, where all ranks have opened the same: a live run may gain a checkpoint meanwhile. Collective.

    Raises:
        ValueError: the ranks have opened different folders.
    """
    folders = sorted(set(everyones(str(source.folder), mesh.world)))
    if len(folders) > 1:
        raise ValueError(
            f"the ranks have opened different weights, {folders[0]} and {folders[-1]}, which a run has just written or "
            f"removed; start again, or name one checkpoint's folder"
        )
    return source


def frozen(config: Config, mesh: Mesh, source: Source) -> Trainer:
    """A model that is not trained, with the weights of `source` and their shape; every rank reads its own part.
    Collective.

    Raises:
        ValueError: as `agreed`, or the model does not fit the configuration.
    """
    config = adopt(config, agreed(source, mesh).model, source.folder)
    trainer = Trainer(config, mesh, build_stages(config, mesh), None)
    fill(trainer, source)
    return trainer


@torch.no_grad()
def fill(trainer: Trainer, source: Source) -> None:
    """Read a frozen model's weights."""
    for stage in trainer.stages.values():
        for piece, view in views(stage):
            source.read(piece.name, piece.rect, view)
