"""The timeline of a pipeline's step as a figure: one row a rank, one box an action.

matplotlib is imported where it draws, so that `import megallama.plan` stays quick. Kinds of action differ in lightness
too, for print without colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from megallama.pipeline.program import COMPUTE, TOWARDS, Event, Program, bubble, owners

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

LABELS = {"F": "forward", "B": "backward", "W": "weight gradient"}
SHADES = {"F": ("#cde1f4", "#93c0e6"), "B": ("#d17322", "#7d3c0c"), "W": ("#2a6048", "#2a6048")}
"""Of each kind's first and last chunk of a rank. Lightness of CIELAB: F 88 to 76, B 58 to 33, W 37."""
INK, PALE = "#1d2733", "#ffffff"
MICROS = 64
"""Micro-batches of one chunk that a row can show; of a longer step the middle is left out."""
UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
"""Units of time a second, the largest first."""
TRANSFERS = 160
"""Arrows that can be told apart in one picture."""
HALF = 0.38
"""Of a row's height, in rows."""
SMALLEST, LARGEST, EM = 5.0, 9.0, 0.75
"""Sizes of text in boxes, in points, and the width that a character needs there as a share of its size."""


class Look(NamedTuple):
    """Of boxes."""

    face: str
    edge: str
    hatch: str = ""
    line: float = 0.5


IDLE = Look(PALE, "#c9ced6", "////")
RECOMPUTE = "||||||"
TAIL = (
    Look("#8e6bb0", INK, "\\\\\\\\"),
    Look("#f2d95c", INK),
    Look("#9aa3ad", INK, "xxxx"),
    Look("#e39ac0", INK, "...."),
)
"""Of the bars' labels, in the order in which they appear."""


class Bar(NamedTuple):
    """What a rank does beside or behind the pipeline (gradient reduction, optimizer, gather), in seconds."""

    rank: int
    label: str
    start: float
    end: float


class Timeline(NamedTuple):
    """What a step's timeline shows; times in seconds.

    Attributes:
        schedule: parallel.schedule, for the title.
        program: plain or lowered.
        events: of `simulate(program, cost, hop)`.
        hop: time of a transfer between ranks.
        after: full bars where the rank's pipeline is idle, slim ones where they run beside compute.
        recompute: of each stage, how much of each backward's beginning repeats the forward; empty for none.
    """

    schedule: str
    program: Program
    events: list[Event]
    hop: float = 0.0
    after: Sequence[Bar] = ()
    recompute: Sequence[float] = ()

    @property
    def ranks(self) -> int:
        return len(self.program)

    @property
    def chunks(self) -> int:
        """Of the model on each rank."""
        return (1 + max(event.action.stage for event in self.events)) // self.ranks

    @property
    def micros(self) -> int:
        return 1 + max(event.action.micro for event in self.events)

    @property
    def span(self) -> float:
        """Until the pipeline is empty."""
        return max(event.end for event in self.events)

    @property
    def end(self) -> float:
        return max([self.span, *(bar.end for bar in self.after)])

    @property
    def shown(self) -> int:
        """Micro-batches that one row has room for: enough to fill and drain the pipeline."""
        return max(MICROS // self.chunks, 2 * self.ranks)

    def windows(self) -> list[tuple[float, float]]:
        """The whole step, or its beginning and its end, each with half of the micro-batches there is room for."""
        half = self.span * self.shown / self.micros / 2
        if self.span < 2.5 * half:  # too little would be left out
            return [(0.0, self.end)]
        return [(0.0, half), (self.span - half, self.end)]

    def transfers(self) -> Iterator[tuple[int, int, float]]:
        """(sending rank, receiving rank, time at which it leaves) of each result that another rank consumes."""
        owner = owners([[action for action in row if action.kind in COMPUTE] for row in self.program])
        for (kind, stage, _), rank, _, end in self.events:
            receiver = owner.get(stage + TOWARDS[kind], rank) if kind in TOWARDS else rank
            if receiver != rank:
                yield rank, receiver, end

    def beside(self, bar: Bar) -> bool:
        """Whether the bar runs while its rank computes; two that touch, up to rounding, do not."""
        start, end = bar.start + 1e-9 * self.end, bar.end - 1e-9 * self.end
        return any(e.rank == bar.rank and e.start < end and start < e.end for e in self.events)


def timeline_figure(step: Timeline) -> Figure:
    """What the step's ranks compute, when they idle, what they send, and what follows the pipeline.

    Raises:
        ValueError: there are no events, or not as many times of recomputation as stages.
    """
    from matplotlib.figure import Figure

    if not step.events:
        raise ValueError("the timeline has no events: simulate a program of at least one action")
    if len(step.recompute) not in (0, stages := step.chunks * step.ranks):
        raise ValueError(f"recompute has {len(step.recompute)} times for {stages} stages; give one for each, or none")
    windows, row = step.windows(), 0.44 if step.ranks <= 8 else 0.36
    pairs = min(step.micros, step.shown) * step.chunks
    width, height = min(20.0, max(11.0, 8 + 0.2 * pairs)), step.ranks * row + 1.3
    figure = Figure(figsize=(width, height), facecolor="white")
    left, right, gap = 0.75, 0.25, 0.35  # inches
    lengths = [end - start for start, end in windows]
    inner = width - left - right - gap * (len(windows) - 1)
    grid = figure.subplots(1, len(windows), squeeze=False, sharey=True, width_ratios=lengths)[0]
    figure.subplots_adjust(left / width, 0.85 / height, 1 - right / width, 1 - 0.45 / height)
    figure.subplots_adjust(wspace=gap * len(windows) / inner)
    seen = [moment for moment in step.transfers() if any(a <= moment[2] < b for a, b in windows)]
    arrows = seen if len(seen) <= TRANSFERS else []
    points = 72 * inner / sum(lengths)
    for axes, window in zip(grid, windows, strict=True):
        _draw_ground(axes, step, window)
        _draw_compute(axes, step, points)
        _draw_bars(axes, step, points)
        _draw_arrows(axes, arrows, step.hop)
    grid[0].set_yticks(range(step.ranks), [f"rank {rank}" for rank in range(step.ranks)])
    grid[0].set_ylim(step.ranks - 0.45, -0.55)
    factor, unit = time_unit(step.end)
    figure.supxlabel(f"time ({unit})", fontsize=9, color=INK, y=0.4 / height)
    if len(windows) > 1:
        _tear(figure, list(grid), f"{factor * (windows[1][0] - windows[0][1]):.3g} {unit} more")
    figure.suptitle(_title(step), x=left / width, y=1 - 0.1 / height, ha="left", fontsize=11, color=INK)
    _legend(figure, step, bool(arrows))
    return figure


def _title(step: Timeline) -> str:
    chunks = f"{step.chunks} (later chunks darker)" if step.chunks > 1 else "1"
    idle = max(0.0, bubble(step.events, step.ranks))  # rounding can bring it below
    layout = f"pp {step.ranks}, vpp {chunks}, {step.micros} micro-batches"
    return f"{step.schedule}    {layout}    bubble {100 * idle:.1f} %"


def _draw_ground(axes: Axes, step: Timeline, window: tuple[float, float]) -> None:
    """The axes, rank 0 on top, and idle rows, which the rest covers."""
    factor, _ = time_unit(step.end)
    axes.set_xlim(window)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds * factor:.6g}")
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    _boxes(axes, "idle", [(rank, 0.0, step.end) for rank in range(step.ranks)], IDLE)
    if step.end > step.span:
        axes.axvline(step.span, color=INK, linestyle=":", linewidth=1)


def _draw_compute(axes: Axes, step: Timeline, points: float) -> None:
    """Boxes of the actions with their micro-batches' numbers; a second is so many points wide."""
    start, end = axes.get_xlim()
    seen = [event for event in step.events if event.start < end and event.end > start]
    digits = len(str(max((event.action.micro for event in seen), default=0)))
    line = min(0.7, points * min((e.end - e.start for e in seen if e.end > e.start), default=1.0) / 12)
    faces = [shade(e.action.kind, e.action.stage // step.ranks, step.chunks) for e in seen]
    _boxes(axes, "compute", [event[1:] for event in seen], Look(PALE, PALE, line=line)).set_facecolor(faces)
    if any(step.recompute):
        backwards = [event for event in seen if event.action.kind == "B"]
        again = [(e.rank, e.start, e.start + step.recompute[e.action.stage]) for e in backwards]
        _boxes(axes, "recompute", again, Look("none", PALE, RECOMPUTE, line))
    for event, face in zip(seen, faces, strict=True):
        _write(axes, event[1:], str(event.action.micro), points / digits, face)


def _draw_bars(axes: Axes, step: Timeline, points: float) -> None:
    """What runs behind the pipeline, with its label, and slim what runs beside it; a second is so many points wide."""
    for label, look in _tail_looks(step).items():
        for bar in (bar for bar in step.after if bar.label == label):
            place, slim = (bar.rank, bar.start, bar.end), step.beside(bar)
            _boxes(axes, label, [place], look, top=HALF / 2 if slim else -HALF)
            if not slim:
                _write(axes, place, label, points / len(label), look.face)


def _draw_arrows(axes: Axes, arrows: list[tuple[int, int, float]], hop: float) -> None:
    """From the sender's row to the receiver's, paler where they cross the rows of others."""
    look = {"arrowstyle": "-|>,head_width=0.12,head_length=0.2", "color": INK, "linewidth": 0.7}
    for sender, receiver, leaves in arrows:
        side = HALF if receiver > sender else -HALF
        style = look | {"shrinkA": 0, "shrinkB": 0, "alpha": 1.0 if abs(receiver - sender) == 1 else 0.3}
        places = (leaves + hop, receiver - side), (leaves, sender + side)
        axes.annotate("", *places, arrowprops=style, annotation_clip=True)


def _boxes(
    axes: Axes, name: str, places: Sequence[tuple[int, float, float]], look: Look, top: float = -HALF
) -> PolyCollection:
    """Boxes, each (rank, start, end), as one collection."""
    from matplotlib.collections import PolyCollection

    corners = [[(s, r + top), (e, r + top), (e, r + HALF), (s, r + HALF)] for r, s, e in places]
    boxes = PolyCollection(corners, gid=name, facecolor=look.face, edgecolor=look.edge, linewidth=look.line)
    boxes.set_hatch(look.hatch)
    axes.add_collection(boxes, autolim=False)
    return boxes


def _write(axes: Axes, place: tuple[int, float, float], text: str, points: float, face: str) -> None:
    """Text in the middle of a box of this colour, in which a second gives each character so many points.

    Nothing is written where it would be too small or cut off.
    """
    rank, start, end = place
    middle, size = (start + end) / 2, min(LARGEST, points * (end - start) / EM)
    first, last = axes.get_xlim()
    if size >= SMALLEST and first < middle < last:
        ground = {"facecolor": face, "edgecolor": "none", "pad": 1} if len(text) > 4 else None  # words, on a hatch
        colour = PALE if dark(face) else INK
        axes.text(middle, rank, text, fontsize=size, color=colour, ha="center", va="center", bbox=ground)


def _tear(figure: Figure, grid: list[Axes], text: str) -> None:
    """Torn edges between the beginning and the end of a step, and what is left out between them."""
    left, right = (axes.get_position() for axes in grid)
    for axes, edge, box in zip(grid, (1.0, 0.0), (left, right), strict=True):
        tooth = 0.05 / (box.width * figure.get_figwidth())
        across, along = [edge - tooth, edge + tooth] * 12, [place / 23 for place in range(24)]
        axes.plot(across, along, color=INK, linewidth=1, clip_on=False, transform=axes.transAxes)
    x, y = (left.x1 + right.x0) / 2, (left.y0 + left.y1) / 2
    figure.text(x, y, text, rotation=90, fontsize=8, color=INK, ha="center", va="center")


def _legend(figure: Figure, step: Timeline, arrows: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [kind for kind in LABELS if any(event.action.kind == kind for event in step.events)]
    looks = {LABELS[kind]: Look(shade(kind, 0, step.chunks), PALE) for kind in kinds}
    if any(step.recompute):
        looks["recompute"] = Look(SHADES["B"][0], PALE, RECOMPUTE)
    looks |= {"idle": IDLE} | _tail_looks(step)
    handles: list[Artist] = [
        Patch(facecolor=look.face, edgecolor=look.edge, hatch=look.hatch, linewidth=look.line, label=label)
        for label, look in looks.items()
    ]
    if arrows:
        handles.append(Line2D([], [], color=INK, marker=">", markersize=4, linewidth=0.7, label="transfer"))
    if step.end > step.span:
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, label="pipeline empty"))
    legend = figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), fontsize=8.5, handlelength=1.6, columnspacing=1.3
    )
    legend.set_frame_on(False)


def _tail_looks(step: Timeline) -> dict[str, Look]:
    labels = dict.fromkeys(bar.label for bar in step.after)
    return dict(zip(labels, cycle(TAIL), strict=False))


def shade(kind: str, chunk: int, chunks: int) -> str:
    """The kind's colour, the darker the later the chunk."""
    from matplotlib.colors import to_hex, to_rgb

    first, last = (to_rgb(colour) for colour in SHADES[kind])
    share = chunk / max(chunks - 1, 1)
    red, green, blue = (a + share * (b - a) for a, b in zip(first, last, strict=True))
    return to_hex((red, green, blue))


def dark(colour: str) -> bool:
    """Whether text on it must be pale."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def time_unit(seconds: float) -> tuple[float, str]:
    """(factor, name) of the unit in which a picture's time reads best."""
    return next(((factor, unit) for factor, unit in UNITS if seconds * factor >= 2), UNITS[-1])
