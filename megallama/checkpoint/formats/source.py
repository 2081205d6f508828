"""What every format is read as: canonical rectangles of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megallama.checkpoint.tensors import WINDOW
from megallama.checks import HEADS
from megallama.config import ModelConfig
from megallama.model.canonical import TRAINING_ONLY
from megallama.parallel.pieces import Rect, matrix

LIMITS: dict[type, float] = {int: 2**31, float: torch.finfo(torch.float64).max}
"""Foreign numbers lie below."""


class Source(Protocol):
    """A model's weights in some format; opening one reads headers only.

    Attributes:
        folder: where it lies, for messages.
        model: the model's shape.
        shapes: canonical name -> shape, of all of the model's tensors, in canonical order.
    """

    folder: Path
    model: ModelConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Canonical name -> what it is stored as."""

    def read(self, name: str, rect: Rect, out: Tensor) -> None:
        """Write rectangle `rect` of tensor `name` to `out` (height, width), cast to its dtype.

        Raises:
            ValueError: the model has no such tensor or rectangle, or its bytes are damaged.
        """


def read_whole(source: Source, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor in its own shape, as `dtype` (None = as it is stored)."""
    rows, cols = matrix(source.shapes[name])
    out = torch.empty(rows, cols, dtype=dtype or source.dtypes[name])
    source.read(name, Rect(0, rows, 0, cols), out)
    return out.view(source.shapes[name])


def read_fitting(source: Source, name: str, rect: Rect, out: Tensor) -> None:
    """Read a rectangle; rounding it to `out`'s dtype must leave finite what is finite.

    Raises:
        ValueError: a value is too large for that dtype; names the largest one.
    """
    source.read(name, rect, out)
    dtype = source.dtypes[name]
    if torch.promote_types(dtype, out.dtype) == out.dtype or all(map(torch.isfinite, out.aminmax())):
        return
    step = max(1, WINDOW // (rect.width * dtype.itemsize))
    for r0 in range(rect.r0, rect.r1, step):
        block = rect._replace(r0=r0, r1=min(rect.r1, r0 + step))
        exact = torch.empty(block.height, block.width, dtype=dtype)
        source.read(name, block, exact)
        rounded = out[r0 - rect.r0 : block.r1 - rect.r0]
        lost = exact[exact.isfinite() & ~rounded.isfinite()]
        if lost.numel():
            raise ValueError(
                f"{source.folder}: {name} has a value of {lost[lost.abs().argmax()]:g}, but {out.dtype} ends at "
                f"{torch.finfo(out.dtype).max:g}; choose a wider dtype, or keep each tensor's own"
            )


def require_model(source: Source, model: ModelConfig) -> None:
    """Check that the weights mean in `model` what they mean in `source`.

    Raises:
        ValueError: names the keys that differ, with both values.
    """
    pairs = {f.name: (getattr(model, f.name), getattr(source.model, f.name)) for f in fields(ModelConfig)}
    wrong = [f"model.{key}={a} (there {b})" for key, (a, b) in pairs.items() if a != b and key not in TRAINING_ONLY]
    if wrong:
        raise ValueError(f"{source.folder} holds another model: {', '.join(wrong)}; set them to the folder's values")


def require_inside(source: Source, name: str, rect: Rect) -> None:
    """Check that the model has such a rectangle."""
    shape = source.shapes.get(name)
    rows, cols = matrix(shape) if shape else (0, 0)
    if not (0 <= rect.r0 < rect.r1 <= rows and 0 <= rect.c0 < rect.c1 <= cols):
        raise ValueError(f"{source.folder}: {name} has shape {shape}; rectangle {tuple(rect)} lies outside")


def checked_model(where: Path, values: Mapping[str, Any], names: Mapping[str, str]) -> ModelConfig:
    """The model of foreign numbers, none of which is believed.

    Args:
        where: the file that says so, for messages.
        names: key of ModelConfig -> what the file calls it, where that differs.

    Raises:
        ValueError: a value is of another type, not positive, or does not fit the others; names the file's key.
    """
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key == "head" and value not in HEADS:
            raise ValueError(f"{where}: {names.get(key, key)} is {value!r:.80}; it must be one of {', '.join(HEADS)}")
        kind, said = type(getattr(ModelConfig, key)), names.get(key, key)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{where}: {said} is {value!r:.80}; it must be of type {kind.__name__}")
        if kind not in (bool, str) and not 0 < value < LIMITS[kind]:
            raise ValueError(f"{where}: {said} is {value!r:.80}; it must be positive, and below {LIMITS[kind]:.10g}")
        taken[key] = kind(value)
    model = ModelConfig(**taken)
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % heads or heads % groups:
        hidden, head, group = (names.get(k, k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        raise ValueError(
            f"{where}: {head}={heads} must divide {hidden}={model.hidden_size}, and {group}={groups} must divide {head}"
        )
    if model.head_dim % 2:
        raise ValueError(f"{where}: heads are {model.head_dim} wide; rotary embeddings need an even width")
    return model


def refuse_layers(where: Path, model: ModelConfig, tensors: int) -> None:
    """Stop at a number of layers that the tensors cannot fill, before anything counts to it.

    Raises:
        ValueError: gives both numbers.
    """
    if model.num_hidden_layers > tensors:
        raise ValueError(f"{where} makes {model.num_hidden_layers} layers, but there are only {tensors} tensors")
