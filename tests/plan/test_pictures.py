"""The planner's pictures: what stands in a figure is what was planned; files appear whole."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from megallama.pipeline import Event, Program, bubble, build, forward_only, lower, simulate
from megallama.plan.pictures import ScalingPoint, memory, memory_figure, scaling, scaling_figure, timeline
from megallama.plan.report import GIB
from megallama.plan.timeline import HALF, LABELS, TRANSFERS, Bar, Timeline, shade, timeline_figure

ROOT = Path(__file__).parents[2]
SIZES = {  # schedule, pp, micro-batches, vpp
    "gpipe": ("gpipe", 4, 8, 1),
    "1f1b": ("1f1b", 4, 8, 1),
    "interleaved": ("interleaved", 4, 8, 2),
    "zero-bubble": ("zero-bubble", 4, 8, 1),
    "one rank": ("1f1b", 1, 3, 1),
}
HOP = 0.003


def planned(schedule: str, pp: int, micros: int, vpp: int) -> tuple[Program, list[Event]]:
    """A lowered program and its events, with stages of uneven cost, in seconds."""
    program = lower(build(schedule, pp, micros, vpp))
    unit = {"F": 0.010, "B": 0.018, "W": 0.009}
    return program, simulate(program, lambda a: unit[a.kind] * (1 + 0.3 * (a.stage == pp * vpp - 1)), HOP)


def step(name: str, **more: object) -> Timeline:
    schedule, *sizes = SIZES[name]
    return Timeline(schedule, *planned(schedule, *sizes), HOP)._replace(**more)


def boxes(axes: Axes, name: str) -> np.ndarray:
    """(boxes, 4): left, right, top and bottom of the boxes of that name."""
    found = [c for c in axes.collections if isinstance(c, PolyCollection) and c.get_gid() == name]
    corners = np.array([path.vertices for c in found for path in c.get_paths()]).reshape(-1, 5, 2)
    x, y = corners[..., 0], corners[..., 1]
    return np.stack([x.min(1), x.max(1), y.min(1), y.max(1)], 1)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lightness(colour: str) -> float:
    """L* of CIELAB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 116 * float(np.dot(linear, (0.2126, 0.7152, 0.0722))) ** (1 / 3) - 16


def extents(figure: Figure, artists: list) -> list[Bbox]:
    """Where they stand on the canvas once it is drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [artist.get_window_extent(canvas.get_renderer()) for artist in artists]


@pytest.mark.parametrize("name", SIZES)
def test_each_event_is_a_box_from_its_start_to_its_end(name: str) -> None:
    shown = step(name)
    figure = timeline_figure(shown)
    (axes,) = figure.axes
    expected = [(e.start, e.end, e.rank - HALF, e.rank + HALF) for e in shown.events]
    np.testing.assert_allclose(boxes(axes, "compute"), expected)
    numbers = [text.get_text() for text in axes.texts if text.get_text()]
    assert numbers == [str(e.action.micro) for e in shown.events]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {r}" for r in range(shown.ranks)]
    top, bottom = axes.get_ylim()[::-1]
    assert top < 0 <= shown.ranks - 1 < bottom, "rank 0 stands on top"


@pytest.mark.parametrize("name", SIZES)
def test_title_and_legend_state_the_schedule(name: str) -> None:
    schedule, pp, micros, vpp = SIZES[name]
    shown = step(name)
    figure = timeline_figure(shown)
    chunks = f"{vpp} (later chunks darker)" if vpp > 1 else "1"
    idle = 100 * bubble(shown.events, pp)
    expected = f"{schedule}    pp {pp}, vpp {chunks}, {micros} micro-batches    bubble {abs(idle):.1f} %"
    assert figure.get_suptitle() == expected
    weight = ["weight gradient"] if schedule == "zero-bubble" else []
    assert legend(figure) == ["forward", "backward", *weight, "idle", *(["transfer"] if pp > 1 else [])]


def test_forward_only_programs_have_a_timeline() -> None:
    program = forward_only(2, 3)
    figure = timeline_figure(Timeline("forward", program, simulate(program, {"F": 1e-5})))
    assert legend(figure) == ["forward", "idle", "transfer"]
    assert figure.get_supxlabel() == "time (µs)"


def test_arrows_go_from_the_sender_to_the_receiver() -> None:
    shown = step("interleaved")
    arrows = [text for text in timeline_figure(shown).axes[0].texts if not text.get_text()]
    sends = sum(action.kind in ("SF", "SB") for row in shown.program for action in row)
    assert len(arrows) == sends == len(list(shown.transfers()))
    starts = {(event.action, event.rank): event.start for event in shown.events}
    for arrow, (sender, receiver, leaves) in zip(arrows, shown.transfers(), strict=True):
        (arrives, head), (left, tail) = arrow.xy, arrow.get_position()
        assert (left, arrives) == (leaves, leaves + HOP)
        assert (round(tail), round(head)) == (sender, receiver)
        assert any(rank == receiver and start >= arrives - 1e-9 for (_, rank), start in starts.items())


def test_more_transfers_than_can_be_seen_are_left_out() -> None:
    shown = Timeline("1f1b", *planned("1f1b", 8, 32, 1), HOP)
    assert len(list(shown.transfers())) > TRANSFERS
    figure = timeline_figure(shown)
    assert "transfer" not in legend(figure)
    assert all(text.get_text() for text in figure.axes[0].texts)


def test_bars_follow_the_pipeline_or_run_beside_it() -> None:
    shown = step("1f1b")
    ends = [max(e.end for e in shown.events if e.rank == rank) for rank in range(4)]
    behind = [Bar(r, "gradient reduction", float(np.nextafter(end, 0)), end + 0.05) for r, end in enumerate(ends)]
    beside = [Bar(0, "gather", ends[0] - 0.01, ends[0] + 0.01)]
    figure = timeline_figure(shown._replace(after=[*behind, *beside]))
    (axes,) = figure.axes
    expected = [(b.start, b.end, b.rank - HALF, b.rank + HALF) for b in behind]
    np.testing.assert_allclose(boxes(axes, "gradient reduction"), expected)
    np.testing.assert_allclose(boxes(axes, "gather"), [(ends[0] - 0.01, ends[0] + 0.01, HALF / 2, HALF)])
    assert axes.get_xlim() == (0, max(ends) + 0.05)
    assert legend(figure)[2:] == ["idle", "gradient reduction", "gather", "transfer", "pipeline empty"]
    written = [text.get_text() for text in axes.texts]
    assert written.count("gradient reduction") == 4 and "gather" not in written
    assert figure.get_suptitle().endswith(f"bubble {100 * bubble(shown.events, 4):.1f} %"), "of the pipeline alone"


def test_recomputation_is_the_beginning_of_each_backward() -> None:
    times = [0.010, 0.011, 0.012, 0.013]
    shown = step("1f1b", recompute=times)
    figure = timeline_figure(shown)
    expected = [(e.start, e.start + times[e.action.stage]) for e in shown.events if e.action.kind == "B"]
    np.testing.assert_allclose(boxes(figure.axes[0], "recompute")[:, :2], expected)
    assert "recompute" in legend(figure)


def test_kinds_and_chunks_differ_without_colour() -> None:
    """In greyscale: every chunk of one kind lies apart from every chunk of the others, and later chunks are darker."""
    for kind in "FB":
        tones = [lightness(shade(kind, chunk, 4)) for chunk in range(4)]
        assert tones == sorted(tones, reverse=True) and tones[0] - tones[-1] > 10
    assert lightness(shade("F", 1, 2)) - lightness(shade("B", 0, 2)) > 15
    assert lightness(shade("B", 0, 1)) - lightness(shade("W", 0, 1)) > 15
    faces = [c for c in timeline_figure(step("zero-bubble")).axes[0].collections if c.get_gid() == "compute"]
    assert len({tuple(face) for face in faces[0].get_facecolor()}) == len(LABELS)


@pytest.mark.parametrize(("pp", "micros", "vpp"), [(4, 100, 1), (8, 48, 4), (2, 1024, 1)])
def test_a_long_step_shows_its_beginning_and_its_end(pp: int, micros: int, vpp: int) -> None:
    schedule = "interleaved" if vpp > 1 else "1f1b"
    shown = Timeline(schedule, *planned(schedule, pp, micros, vpp), HOP, [Bar(0, "optimizer", 60.0, 60.1)])
    figure = timeline_figure(shown)
    begin, end = figure.axes
    middle = (begin.get_xlim()[1], end.get_xlim()[0])
    assert (begin.get_xlim()[0], end.get_xlim()[1]) == (0, shown.end)
    assert middle[1] - middle[0] > 0.2 * shown.span
    seen = {tuple(box[:2]) for axes in figure.axes for box in boxes(axes, "compute")}
    assert {(e.start, e.end) for e in shown.events if not middle[0] <= e.start <= e.end <= middle[1]} == seen
    ramps = [min(e.end for e in shown.events if e.rank == r and e.action.kind == "B") for r in range(pp)]
    assert max(ramps) < middle[0], "every rank has begun with its backwards where the middle is left out"
    assert f"{middle[1] - middle[0]:.3g} s more" in [text.get_text() for text in figure.texts]
    assert figure.get_supxlabel() == "time (s)"


def test_what_just_fits_is_not_torn() -> None:
    for micros in (64, 79):
        assert len(timeline_figure(Timeline("1f1b", *planned("1f1b", 2, micros, 1))).axes) == 1


@pytest.mark.parametrize("name", ["interleaved", "zero-bubble", "one rank"])
def test_nothing_of_a_timeline_overlaps(name: str) -> None:
    shown = step(name)
    labels = ("gradient reduction", "optimizer", "gather")
    after = [
        Bar(r, label, shown.span + i, shown.span + i + 1) for r in range(shown.ranks) for i, label in enumerate(labels)
    ]
    figure = timeline_figure(shown._replace(after=after, recompute=[0.01] * shown.ranks * shown.chunks))
    parts = [figure._suptitle, figure._supxlabel, figure.legends[0], figure.axes[0].patch]
    placed = extents(figure, parts)
    assert not any(Bbox.intersection(a, b) for a, b in combinations(placed, 2))
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in placed)


def test_timelines_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="no events: simulate a program"):
        timeline_figure(Timeline("1f1b", [[], []], []))
    with pytest.raises(ValueError, match="recompute has 2 times for 8 stages; give one for each, or none"):
        timeline_figure(step("interleaved", recompute=[0.1, 0.1]))


SERIES = [[(0.0, 30 * GIB), (0.1, 42.5 * GIB), (0.3, 30 * GIB)], [(0.0, 28 * GIB), (0.2, 35 * GIB)]]


def test_memory_is_a_line_of_steps_for_each_rank() -> None:
    figure = memory_figure(SERIES, 80)
    (axes,) = figure.axes
    first, second, limit = axes.lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0, 0.1, 0.3, 0.3], [30, 42.5, 30, 30])
    assert (list(second.get_xdata()), list(second.get_ydata())) == ([0, 0.2, 0.3], [28, 35, 35])
    assert first.get_drawstyle() == "steps-post" and first.get_color() != second.get_color()
    assert list(limit.get_ydata()) == [80, 80] and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 80
    assert legend(figure) == ["rank 0, peak 42.50 GiB", "rank 1, peak 35.00 GiB", "limit 80 GiB"]
    assert axes.get_title("left") == "memory    peak 42.50 GiB on rank 0, 37.50 GiB below the limit"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time (ms)", "memory (GiB)")


def test_memory_over_the_limit_is_said_and_seen() -> None:
    (axes,) = memory_figure(SERIES, 40).axes
    assert axes.get_title("left").endswith("2.50 GiB over the limit")
    assert axes.get_ylim()[1] > 42.5


def test_memory_needs_values_for_every_rank() -> None:
    for series in ([], [SERIES[0], []]):
        with pytest.raises(ValueError, match="at least one"):
            memory_figure(series, 80)


LAYOUT = "tp 8 x pp 16 x dp 4, 2 chunks, micro-batch 1, interleaved, recompute selective"
DOUBLING = [ScalingPoint(g, 380.0 * g * (1 - g / 4096), f"{LAYOUT} on {g}") for g in (1024, 64, 128, 256, 512)]
DENSE = [ScalingPoint(g, 300.0 * g**0.97, f"dp {g}") for g in range(64, 2049, 124)]
WORSE = [
    ScalingPoint(8, 900.0, "tp 1 x pp 4 x dp 2, micro-batch 1, zero-bubble, recompute full"),
    ScalingPoint(16, 800.0, "tp 8, dp 2"),
    ScalingPoint(32, 2000.0, "tp 8, dp 4"),
]


def test_scaling_stands_beside_the_ideal_of_the_fewest_gpus() -> None:
    upper, lower = scaling_figure(DOUBLING).axes
    ideal, predicted = upper.lines
    gpus, rates = [64, 128, 256, 512, 1024], [380.0 * g * (1 - g / 4096) for g in (64, 128, 256, 512, 1024)]
    assert list(predicted.get_xdata()) == gpus and list(predicted.get_ydata()) == rates
    assert list(ideal.get_ydata()) == [rates[0] * 2**i for i in range(5)]
    assert upper.get_xscale() == upper.get_yscale() == lower.get_xscale() == "log"
    expected = [100 * (1 - g / 4096) / (1 - 64 / 4096) for g in gpus]
    np.testing.assert_allclose(lower.lines[0].get_ydata(), expected)
    assert [label.get_text() for label in lower.get_xticklabels()] == [str(g) for g in gpus[::-1]]


@pytest.mark.parametrize("points", [DOUBLING, DENSE, WORSE, DOUBLING[:1]], ids=["doubling", "dense", "worse", "one"])
def test_layouts_are_legible_beside_their_points(points: list[ScalingPoint]) -> None:
    figure = scaling_figure(points)
    upper, lower = figure.axes
    (ground,) = extents(figure, [upper.patch])
    labels = [Text.get_window_extent(text) for text in upper.texts]  # without the line to its point
    layouts = {text.xy: text.get_text().replace("\n", " ") for text in upper.texts}
    assert layouts == {(p.gpus, p.tokens_per_second): p.layout for p in points}
    assert not any(Bbox.intersection(a, b) for a, b in combinations(labels, 2))
    assert all(ground.x0 <= box.x0 and box.x1 <= ground.x1 and ground.y0 <= box.y0 for box in labels)
    ticks = extents(figure, lower.get_xticklabels())
    assert not any(Bbox.intersection(a, b) for a, b in combinations(ticks, 2))


def test_scaling_needs_points_with_a_place() -> None:
    with pytest.raises(ValueError, match="at least one number of GPUs"):
        scaling_figure([])
    with pytest.raises(ValueError, match="'tp 1' with 0 tokens a second on 8 GPUs has no place"):
        scaling_figure([ScalingPoint(8, 0.0, "tp 1")])


def test_pictures_are_png_files_that_appear_whole(tmp_path: Path) -> None:
    schedule, *sizes = SIZES["1f1b"]
    paths = [tmp_path / f"{name}.png" for name in ("timeline", "memory", "scaling")]
    paths[1].write_text("an older picture")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.hardlink_to(paths[1])
    timeline(Timeline(schedule, *planned(schedule, *sizes), HOP), paths[0])
    memory(SERIES, 80, paths[1])
    scaling(DOUBLING, paths[2])
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, *paths]), "nothing else is left"
    assert elsewhere.read_text() == "an older picture", "the new one took its place, and did not write into it"
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def test_an_older_picture_stays_where_a_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    path.write_text("an older picture")
    with pytest.raises(ValueError):
        memory([], 80, path)
    with pytest.raises(OSError):
        memory(SERIES, 80, tmp_path / "no folder" / "memory.png")
    assert path.read_text() == "an older picture" and list(tmp_path.iterdir()) == [path]


def test_import_leaves_matplotlib_and_torch_alone() -> None:
    code = "import sys, megallama.plan.pictures; sys.exit(bool({'matplotlib', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
