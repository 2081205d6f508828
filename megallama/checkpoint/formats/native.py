"""Our own checkpoints as sources, and written from any source: weights alone, as a run could have stored them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.checkpointer import BESIDE, checkpoint_folders, manifest_model
from megallama.checkpoint.formats.placement import new_folder
from megallama.checkpoint.formats.source import Source, checked_model, read_fitting, refuse_layers
from megallama.checkpoint.formats.tokenizer_files import copy_along
from megallama.checkpoint.store import MANIFEST, Store, Stored, write_manifest, write_rectangles
from megallama.config import ModelConfig
from megallama.model.canonical import canonical_shapes
from megallama.parallel.pieces import Rect, matrix, shard

WEIGHT = "weight"


class StoreSource:
    """The weights of a checkpoint as a source.

    Args:
        folder: a checkpoint, or a run or its checkpoints folder: then the newest one that opens.
        note: told of newer ones that do not.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """

    def __init__(self, folder: Path, note: Callable[[str], None] = print):
        self._store = _open(Path(folder), note)
        self.folder = self._store.folder
        self.model = _model(self._store)
        self.shapes = canonical_shapes(self.model)
        others = tuple(f"{other}." for other in self._store.manifest.get(BESIDE, ()))
        for name in sorted({*self.shapes, *(n for n in self._store.shapes if not n.startswith(others))}):
            here, there = self.shapes.get(name), self._store.shapes.get(name)
            if here != there:
                raise ValueError(f"{self.folder}: {name} has shape {there}, but its model section makes it {here}")
        self.dtypes = {name: self._store.dtype(WEIGHT, name) for name in self.shapes}

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width), cast to its dtype and verified."""
        self._store.read(WEIGHT, name, rect, out)


def _open(folder: Path, note: Callable[[str], None]) -> Store:
    """The checkpoint, or the newest one below that opens."""
    if (folder / MANIFEST).exists():
        return Store(folder)
    faults = []
    for found in checkpoint_folders(folder / "checkpoints") or checkpoint_folders(folder):
        try:
            store = Store(found)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            note(f"{fault}; taking the older {found.name}")
        return store
    raise ValueError("; ".join(faults) or f"{folder} holds no {MANIFEST} and no step_… folder with one")


def _model(store: Store) -> ModelConfig:
    where, section = store.folder / MANIFEST, dict(store.manifest["model"])
    section.pop("preset", None)
    known = {key: value for key, value in vars(ModelConfig()).items() if key != "preset"}
    if unknown := sorted(set(section) - set(known)):
        raise ValueError(f"{where}: model has {unknown[0]}, which this version does not know")
    model = checked_model(where, known | section, {})
    refuse_layers(where, model, len(store.shapes))
    return model


def write_store(
    source: Source,
    folder: Path,
    layout: tuple[int, int] = (1, 1),
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint of weights at step 0. Any layout loads it; its own says only in how many files it is.

    Args:
        layout: (tp, pp): files that share each matrix by rows, and that share the tensors.
        dtype: None = each tensor's own.
        tokenizer: its files go along.

    Raises:
        ValueError: the source is damaged, no run could be laid out so, or the folder holds something.
    """
    (tp, pp), heads, layers = layout, source.model.num_attention_heads, source.model.num_hidden_layers
    if tp > heads or pp > layers:
        raise ValueError(
            f"--tp {tp} x --pp {pp} is more than the model's {heads} attention heads and {layers} layers can be cut "
            f"into; any layout loads any other, so choose smaller ones, such as 1"
        )
    model = manifest_model(source.model)
    meta: dict[str, Any] = {"step": 0, "consumed_samples": 0, "updates": 0, "model": model, "fingerprints": {}}
    names = list(source.shapes)
    each = -(-len(names) // pp)
    with new_folder(folder) as work:
        records = []
        for rank, (p, t) in enumerate(product(range(pp), range(tp))):
            parts = [
                Stored(WEIGHT, name, rect, kind, partial(_values, source, name, rect, kind))
                for name in names[p * each : (p + 1) * each]
                for rect, kind in ((_share(source.shapes[name], t, tp), dtype or source.dtypes[name]),)
                if rect.area
            ]
            if parts:
                records.append(write_rectangles(work, f"rank_{rank:05d}.safetensors", parts))
        copy_along(tokenizer, work)
        write_manifest(work, records, source.shapes, meta)


def _share(shape: tuple[int, ...], t: int, tp: int) -> Rect:
    """The rows that file `t` of `tp` holds; none of them where there are fewer rows."""
    rows, cols = matrix(shape)
    return shard("", (rows, cols), 0, t, tp).rect


def _values(source: Source, name: str, rect: Rect, dtype: torch.dtype) -> Tensor:
    out = torch.empty(rect.height, rect.width, dtype=dtype)
    read_fitting(source, name, rect, out)
    return out
