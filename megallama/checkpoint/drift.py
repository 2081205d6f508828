"""How far two checkpoints are apart, whatever their formats and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.check import WEIGHT, Report, finite_squares, open_source, parallel, row_blocks, weight_first
from megallama.checkpoint.formats.convert import Note
from megallama.checkpoint.formats.native import StoreSource
from megallama.checkpoint.formats.source import Source
from megallama.checkpoint.store import Store
from megallama.config import ModelConfig
from megallama.model.canonical import TRAINING_ONLY
from megallama.parallel.pieces import Rect


class Side(NamedTuple):
    """One of two checkpoints that are compared; `states` are what reads rectangles of each state's tensors."""

    form: str
    source: Source
    states: dict[str, Callable[[str, Rect, Tensor], None]]


def open_side(folder: Path, form: str | None, note: Note) -> Side:
    """A checkpoint to compare; of a run its newest.

    Raises:
        ValueError: there is none, or a damaged one.
    """
    form, source = open_source(folder, form, note)
    if not isinstance(source, StoreSource):
        return Side(form, source, {WEIGHT: source.read})
    store = Store(source.folder)
    return Side(form, source, {state: partial(store.read, state) for state in sorted(store.states, key=weight_first)})


class Drift(NamedTuple):
    """How far tensor `name` of B is from A's.

    Attributes:
        differing: elements whose bits differ, both taken as fp64.
        largest: of |a - b|; infinite where one is no number.
        at: its first place, (row, column) or (element,).
        squares: sum of (a - b)².
        scale: sum of a².
    """

    state: str
    name: str
    elements: int
    differing: int
    largest: float
    at: tuple[int, ...]
    squares: float
    scale: float


def relative(*drifts: Drift) -> float:
    """rms(a - b) / rms(a), of all these tensors together."""
    squares, scale = sum(d.squares for d in drifts), sum(d.scale for d in drifts)
    return math.sqrt(squares / scale) if scale else math.inf if squares else 0.0


class Comparison:
    """Two checkpoints and the tensors that both have.

    Attributes:
        unlike: in what the models differ.
        pairs: (state, name) of what can be compared.
    """

    def __init__(self, a: Side, b: Side):
        self.a, self.b = a, b
        keys = [item.name for item in fields(ModelConfig) if item.name not in TRAINING_ONLY]
        values = [(key, getattr(a.source.model, key), getattr(b.source.model, key)) for key in keys]
        self.unlike = [f"model.{key} is {x} in A, {y} in B" for key, x, y in values if x != y]
        ours, theirs = a.source.shapes, b.source.shapes
        for name in dict.fromkeys((*ours, *theirs)):
            x, y = (str(shapes.get(name, "missing")) for shapes in (ours, theirs))
            if x != y:
                self.unlike.append(f"{name} is {x} in A, {y} in B")
        states = sorted(a.states.keys() & b.states, key=weight_first)
        self.pairs = [(state, name) for state in states for name in ours if theirs.get(name) == ours[name]]

    @property
    def nbytes(self) -> int:
        """What `read` reports."""
        return sum(self._width(name) * math.prod(self.a.source.shapes[name]) for _, name in self.pairs)

    def _width(self, name: str) -> int:
        return self.a.source.dtypes[name].itemsize + self.b.source.dtypes[name].itemsize

    def read(self, report: Report) -> list[Drift]:
        """The drift of every pair, the largest first.

        Raises:
            ValueError: bytes are missing or corrupt; names file and tensor.
        """
        found = parallel(lambda pair: self._drift(pair[0], pair[1], report), self.pairs)
        return sorted(found, key=lambda d: (relative(d), d.largest, d.differing), reverse=True)

    def _drift(self, state: str, name: str, report: Report) -> Drift:
        shape, at = self.a.source.shapes[name], (0, 0)
        differing, largest, squares, scale = 0, 0.0, 0.0, 0.0
        for rect in row_blocks(shape):
            a, b = (torch.empty(rect.height, rect.width, dtype=torch.float64) for _ in range(2))
            self.a.states[state](name, rect, a)
            self.b.states[state](name, rect, b)
            scale += finite_squares(a.view(-1))[0]
            apart = a.view(torch.int64) != b.view(torch.int64)
            if count := int(apart.sum()):
                differing += count
                gap = a.sub_(b).abs_().masked_fill_(~apart, 0).nan_to_num_(nan=math.inf, posinf=math.inf).view(-1)
                squares += float(torch.dot(gap, gap))
                place = int(gap.argmax())
                if float(gap[place]) > largest:
                    largest, at = float(gap[place]), (rect.r0 + place // rect.width, place % rect.width)
            report(rect.area * self._width(name))
        return Drift(state, name, math.prod(shape), differing, largest, at[-len(shape) :], squares, scale)
