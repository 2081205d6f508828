"""Rectangles of canonical tensors: what a layer declares, and the slots of flat memory that follow from it.

Canonical means HF Llama's names and shapes. A 1-D tensor of n elements is one row: its shape is (n,), its rectangle
(0, 1, 0, n). All intervals are half-open. Initialisation, ZeRO-1 shards, the gradient norm, checkpoints and
conversion are one operation on these: intersect rectangles.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Rect(NamedTuple):
    """Rows r0:r1 and columns c0:c1 of a canonical tensor."""

    r0: int
    r1: int
    c0: int
    c1: int

    def meet(self, other: Rect) -> Rect | None:
        """The overlap, or None where there is none."""
        r0, r1 = max(self.r0, other.r0), min(self.r1, other.r1)
        c0, c1 = max(self.c0, other.c0), min(self.c1, other.c1)
        return Rect(r0, r1, c0, c1) if r0 < r1 and c0 < c1 else None

    def shift(self, rows: int, cols: int) -> Rect:
        return Rect(self.r0 + rows, self.r1 + rows, self.c0 + cols, self.c1 + cols)

    @property
    def height(self) -> int:
        return self.r1 - self.r0

    @property
    def width(self) -> int:
        return self.c1 - self.c0

    @property
    def area(self) -> int:
        return self.height * self.width


class Piece(NamedTuple):
    """The local rectangle that starts at `at` is rectangle `rect` of canonical tensor `name` of global `shape`.

    Attributes:
        replicas: the axis whose ranks hold the same rectangle ("" = none, else tp, kv or tied). Its rank 0 owns it:
            the norm and checkpoints count owners only.
        partial: each copy's gradient is a part, to be summed over that axis; else the copies' gradients are equal.
    """

    name: str
    shape: tuple[int, ...]
    rect: Rect
    at: tuple[int, int] = (0, 0)
    replicas: str = ""
    partial: bool = False

    @property
    def local(self) -> Rect:
        """Where the piece lies in the local parameter."""
        return self.rect.shift(self.at[0] - self.rect.r0, self.at[1] - self.rect.c0)


class Slot(NamedTuple):
    """Canonical rectangle `rect` of `name` in flat memory: its element (i, j) lies at start + i * stride + j.

    Attributes:
        owner: this rank counts the rectangle (norm) and writes it (checkpoint); its replicas do not.
    """

    name: str
    rect: Rect
    start: int
    stride: int
    owner: bool

    def view(self, flat: Tensor) -> Tensor:
        """The rectangle as a (height, width) view of 1-D `flat`."""
        size = (self.rect.height, self.rect.width)
        return flat.as_strided(size, (self.stride, 1), flat.storage_offset() + self.start)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as rectangles see it."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def whole(name: str, shape: tuple[int, ...], replicas: str = "", partial: bool = False) -> Piece:
    """The whole canonical tensor, held by every rank of `replicas`."""
    rows, cols = matrix(shape)
    return Piece(name, shape, Rect(0, rows, 0, cols), (0, 0), replicas, partial)


def shard(name: str, shape: tuple[int, int], dim: int, index: int, count: int) -> Piece:
    """Part `index` of `count` along `dim`: ceil(size / count) wide, so that the last parts may be short or empty."""
    step = -(-shape[dim] // count)
    lo = min(shape[dim], index * step)
    hi = min(shape[dim], lo + step)
    return Piece(name, shape, Rect(lo, hi, 0, shape[1]) if dim == 0 else Rect(0, shape[0], lo, hi))


def pieces(model: nn.Module) -> dict[str, list[Piece]]:
    """Local parameter name -> the rectangles of canonical tensors that it holds, in the order of the layers.

    A module that owns parameters declares them in its `pieces` attribute: {parameter name: [Piece, …]}. Elements of
    a parameter that lie in no piece are padding: zero, without gradient, decay, norm or storage.
    """
    return {
        f"{path}.{name}" if path else name: held
        for path, module in model.named_modules()
        for name, held in getattr(module, "pieces", {}).items()
    }


def views(model: nn.Module) -> Iterator[tuple[Piece, Tensor]]:
    """Every piece that the model holds with its (height, width) view of the local parameter."""
    parameters = dict(model.named_parameters())
    for path, held in pieces(model).items():
        local = parameters[path].data.view(matrix(tuple(parameters[path].shape)))
        for piece in held:
            place = piece.local
            yield piece, local[place.r0 : place.r1, place.c0 : place.c1]


def cut(held: Iterable[Piece], cols: int, window: Rect, start: int, owner: dict[str, bool]) -> Iterator[Slot]:
    """Slots of the local rectangle `window` of a parameter with `cols` columns.

    Args:
        held: the parameter's pieces.
        window: the part of the local parameter that lies in flat memory, at row stride `cols`.
        start: where the window's first element lies.
        owner: for each `replicas` name, whether this rank is that axis's rank 0.
    """
    for piece in held:
        hit = piece.local.meet(window)
        if hit:
            canonical = hit.shift(piece.rect.r0 - piece.at[0], piece.rect.c0 - piece.at[1])
            first = start + (hit.r0 - window.r0) * cols + hit.c0 - window.c0
            yield Slot(piece.name, canonical, first, cols, owner[piece.replicas])


def spans(lo: int, hi: int, cols: int) -> Iterator[Rect]:
    """Row-major elements lo:hi of a matrix as at most three rectangles: a row's tail, whole rows, a row's head."""
    if lo >= hi:
        return
    (r0, c0), (r1, c1) = divmod(lo, cols), divmod(hi, cols)
    if r0 == r1:
        yield Rect(r0, r0 + 1, c0, c1)
        return
    if c0:
        yield Rect(r0, r0 + 1, c0, cols)
        r0 += 1
    if r0 < r1:
        yield Rect(r0, r1, 0, cols)
    if c1:
        yield Rect(r1, r1 + 1, 0, c1)


def overlapping(rects: Iterable[Rect]) -> tuple[Rect, Rect] | None:
    """Two of `rects` that share an element, or None; n log n and a list insertion for each."""
    events = sorted(event for rect in rects for event in ((rect.r0, 1, rect), (rect.r1, 0, rect)))
    across: list[tuple[int, int, Rect]] = []  # column intervals of the rectangles that the present row crosses
    for _, starts, rect in events:  # those that end in a row leave before others start
        interval = (rect.c0, rect.c1, rect)
        place = bisect_left(across, interval)
        if not starts:
            del across[place]
            continue
        if place > 0 and across[place - 1][1] > rect.c0:
            return across[place - 1][2], rect
        if place < len(across) and across[place][0] < rect.c1:
            return rect, across[place][2]
        across.insert(place, interval)
    return None


class Index(Generic[T]):
    """Rectangles by canonical name, each with a tag that says where it lies."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[tuple[Rect, T]]] = {}

    def add(self, name: str, rect: Rect, where: T) -> None:
        self.by_name.setdefault(name, []).append((rect, where))

    def cover(self, name: str, rect: Rect) -> list[tuple[Rect, Rect, T]]:
        """[(overlap, stored rectangle, where), …] that cover `rect` exactly once.

        Raises:
            ValueError: elements of `rect` are missing or stored twice.
        """
        stored = self.by_name.get(name, [])
        hits = [(overlap, held, where) for held, where in stored if (overlap := rect.meet(held))]
        missing = rect.area - sum(overlap.area for overlap, _, _ in hits)
        if missing:
            fault = f"{missing} missing" if missing > 0 else f"{-missing} stored twice"
            raise ValueError(
                f"{name} rows {rect.r0}:{rect.r1}, columns {rect.c0}:{rect.c1}: {fault} of {rect.area} elements"
            )
        return hits
