"""Pipeline programs: complete, free of deadlock, as short and as small as published, for every valid size."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.pipeline import (
    SCHEDULES,
    Action,
    Program,
    balance,
    bubble,
    build,
    check,
    forward_only,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    partner,
    peak_activations,
    simulate,
    standard_cost,
    zero_bubble,
)

RANKS, MICROS = range(1, 9), range(1, 33)
ONE_CHUNK = [(p, m, 1) for p in RANKS for m in MICROS]
SIZES = {
    "gpipe": ONE_CHUNK,
    "1f1b": ONE_CHUNK,
    "interleaved": [(p, m, v) for p in RANKS[1:] for m in MICROS for v in (2, 3, 4) if m % p == 0],
    "zero-bubble": ONE_CHUNK,
}
KINDS = {name: "FBW" if name == "zero-bubble" else "FB" for name in SIZES}


def deadlocks(program: Program) -> bool:
    """Independent of `check`: with both ends of a transfer as one node, blocking rows complete if there is no cycle."""
    graph: TopologicalSorter[Action] = TopologicalSorter()
    for row in program:
        nodes = [partner(a) if a.kind[0] == "R" else a for a in row]
        for before, after in itertools.pairwise(nodes):
            graph.add(after, before)
    try:
        graph.prepare()
    except CycleError:
        return True
    return False


def test_table_is_covered() -> None:
    assert set(SIZES) == set(SCHEDULES)


@pytest.mark.parametrize("name", SIZES)
def test_every_action_once_on_its_rank(name: str) -> None:
    for p, m, v in SIZES[name]:
        program = build(name, p, m, v)
        assert len(program) == p
        for rank, row in enumerate(program):
            expected = {Action(k, c * p + rank, i) for k in KINDS[name] for c in range(v) for i in range(m)}
            assert len(row) == len(expected) and set(row) == expected, (name, p, m, v, rank)


@pytest.mark.parametrize("name", SIZES)
def test_lowered_programs_are_sound(name: str) -> None:
    for p, m, v in SIZES[name]:
        program = build(name, p, m, v)
        full = lower(program)
        check(full)
        if m > 9 and m not in (16, 24, 31, 32):
            continue  # what follows says again, independently and slowly, what `check` says of every size
        assert not deadlocks(full)
        assert [[a for a in row if a.kind in KINDS[name]] for row in full] == program, "lowering keeps the order"
        last = p * v - 1
        transfers = Counter(a for row in full for a in row if a.kind[0] in "SR")
        crossing = [(s, i) for s in range(last) for i in range(m)] if p > 1 else []
        assert transfers == Counter(
            a
            for s, i in crossing
            for a in (Action("SF", s, i), Action("RF", s + 1, i), Action("SB", s + 1, i), Action("RB", s, i))
        )
        for rank, row in enumerate(full):
            at = {a: n for n, a in enumerate(row)}
            assert len(at) == len(row)
            for a, n in at.items():
                kind, stage, micro = a
                if kind[0] == "S":
                    assert at[Action(kind[1], stage, micro)] == n - 1, "a result leaves at once"
                elif kind[0] == "R":
                    assert n < at[Action(kind[1], stage, micro)], "received before use"
                elif kind == "B":
                    assert at[Action("F", stage, micro)] < n
                elif kind == "W":
                    assert at[Action("B", stage, micro)] < n
            reductions = [a for a in row if a.kind == "G"]
            assert sorted(reductions) == [Action("G", c * p + rank, 0) for c in range(v)]
            for a in reductions:
                end = max(at[b] for b in at if b.kind in ("B", "W") and b.stage == a.stage)
                between = [row[n].kind for n in range(end + 1, at[a])]
                assert between in ([], ["SB"]), "gradients are reduced right after the last contribution"


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_bubble_is_the_closed_form(name: str, backward: float) -> None:
    for p, m, v in SIZES[name]:
        events = simulate(build(name, p, m, v), {"F": 1.0, "B": backward})
        assert bubble(events, p) == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12), (p, m, v)


def test_zero_bubble_is_the_closed_form() -> None:
    for p, m, _ in SIZES["zero-bubble"]:
        if m >= p:
            events = simulate(zero_bubble(p, m), {"F": 1.0, "B": 1.0, "W": 1.0})
            assert bubble(events, p) == pytest.approx((p - 1) / (3 * m + p - 1), abs=1e-12), (p, m)


@pytest.mark.parametrize(("f", "b", "w"), [(1.0, 1.0, 0.5), (1.0, 2.0, 1.0), (2.0, 3.0, 2.0), (1.0, 1.25, 0.75)])
def test_zero_bubble_idles_as_published(f: float, b: float, w: float) -> None:
    for p, m in [(2, 2), (4, 4), (4, 9), (8, 8), (8, 20)]:
        span = max(e.end for e in simulate(zero_bubble(p, m), {"F": f, "B": b, "W": w}))
        assert span == pytest.approx(m * (f + b + w) + (p - 1) * (f + b - w)), (p, m)
        plain = max(e.end for e in simulate(one_f_one_b(p, m), {"F": f, "B": b + w}))
        assert plain == pytest.approx((m + p - 1) * (f + b + w)), (p, m)


def test_zero_bubble_is_never_slower_than_1f1b() -> None:
    for p, m, _ in SIZES["zero-bubble"]:
        split = simulate(zero_bubble(p, m), {"F": 1.0, "B": 1.0, "W": 1.0})
        plain = simulate(one_f_one_b(p, m), {"F": 1.0, "B": 2.0})
        assert max(e.end for e in split) <= max(e.end for e in plain), (p, m)


def test_peak_activations_are_as_published() -> None:
    for p, m, v in SIZES["interleaved"]:
        held = [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]
        assert peak_activations(interleaved(p, m, v)) == held, (p, m, v)
    for p, m, _ in ONE_CHUNK:
        assert peak_activations(gpipe(p, m)) == [m] * p
        first = [min(m, p - r) for r in range(p)]
        assert peak_activations(one_f_one_b(p, m)) == first
        split = zero_bubble(p, m)
        assert peak_activations(split, kept=0) == first, "whole activations as in 1F1B, rank by rank"
        assert max(peak_activations(split)) == max(first), "and in all no more than 1F1B's first rank"
        if m >= p:
            assert peak_activations(split, kept=0.25) == [p - r + 0.25 * r for r in range(p)]


def test_peak_activations_ignore_communication() -> None:
    program = interleaved(4, 8, 2)
    assert peak_activations(lower(program)) == peak_activations(program)


def test_interleaving_one_chunk_is_1f1b() -> None:
    assert build("interleaved", 4, 6, 1) == interleaved(4, 6, 1) == one_f_one_b(4, 6)


def test_forward_only() -> None:
    for p, m, v in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 7, 8, 16), (1, 2, 4)):
        program = forward_only(p, m, v)
        for rank, row in enumerate(program):
            assert sorted(row) == [Action("F", c * p + rank, i) for c in range(v) for i in range(m)]
        full = lower(program)
        check(full)
        assert not deadlocks(full)
        assert {a.kind for row in full for a in row} <= {"F", "SF", "RF"}
        if m % p == 0:
            assert bubble(simulate(program, {"F": 1.0}), p) == pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)


def test_lowered_1f1b_by_hand() -> None:
    program = lower(one_f_one_b(2, 2))
    assert [" ".join(map(str, row)) for row in program] == [
        "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1 0G0",
        "1RF0 1RF1 1F0 1B0 1SB0 1F1 1B1 1SB1 1G0",
    ]


def test_lowering_is_idempotent_and_keeps_the_times() -> None:
    for name, v in [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)]:
        program = build(name, 4, 8, v)
        full = lower(program)
        assert lower(full) == full
        cost = standard_cost(program)
        assert simulate(full, cost, hop=0.5) == simulate(program, cost, hop=0.5)


@given(st.sampled_from(sorted(SIZES)), st.integers(2, 5), st.integers(1, 8), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_durations_give_sound_programs(name: str, ranks: int, groups: int, seed: int) -> None:
    """Uneven stages, and actions that take no time at all, must not break causality or make a deadlock."""
    program = build(name, ranks, groups * ranks, 2 if name == "interleaved" else 1)
    rng = random.Random(seed)
    times = {a: rng.choice((0.0, 0.0, 0.5, 1.0, 3.0)) for row in program for a in row}
    full = lower(program, times.__getitem__)
    check(full)
    assert not deadlocks(full)


@given(st.sampled_from(sorted(SIZES)), st.integers(2, 4), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_check_finds_exactly_the_deadlocks(name: str, ranks: int, seed: int) -> None:
    """Receives moved to random earlier places keep every row sound by itself; only rendezvous can fail."""
    full = lower(build(name, ranks, ranks))
    rng = random.Random(seed)
    for row in full:
        for n in [n for n, a in enumerate(row) if a.kind[0] == "R" and rng.random() < 0.2]:
            row.insert(rng.randint(max(0, n - 3), n), row.pop(n))
    if deadlocks(full):
        with pytest.raises(ValueError, match="deadlock"):
            check(full)
    else:
        check(full)


def test_check_names_a_planted_deadlock() -> None:
    full = lower(one_f_one_b(2, 2))
    full[0].remove(Action("RB", 0, 0))
    full[0].insert(0, Action("RB", 0, 0))  # waits for a gradient before it sends the activation
    with pytest.raises(ValueError, match="deadlock: rank 0 at 0RB0, rank 1 at 1RF0"):
        check(full)


def test_check_finds_crossed_transfers() -> None:
    full = lower(gpipe(2, 2))
    first, second = (full[0].index(Action("SF", 0, micro)) for micro in range(2))
    full[0].insert(second, full[0].pop(first))  # SF1 before SF0, while the receives stand in order
    with pytest.raises(ValueError, match="deadlock: rank 0 at 0SF1, rank 1 at 1RF0"):
        check(full)


@pytest.mark.parametrize(
    ("drop", "complaint"),
    [
        (Action("RF", 1, 0), r"rank 1: 1F0 runs before the result of 0F0 is there"),
        (Action("SF", 0, 1), r"deadlock: rank 0 at 0RB0, rank 1 at 1RF1"),
        (Action("F", 0, 1), r"rank 0: 0SF1 sends what is not computed yet"),
        (Action("G", 0, 0), r"rank 0: 0G0 is missing"),
    ],
)
def test_check_misses_nothing_that_is_missing(drop: Action, complaint: str) -> None:
    full = [[a for a in row if a != drop] for row in lower(gpipe(2, 2))]
    with pytest.raises(ValueError, match=complaint):
        check(full)


def test_check_rejects_what_stands_twice_or_too_late() -> None:
    full = lower(zero_bubble(2, 2))
    with pytest.raises(ValueError, match="0F0 stands twice"):
        check([[full[0][0], *full[0]], full[1]])
    early = [a for a in full[0] if a.kind != "G"]
    early.insert(-1, Action("G", 0, 0))
    with pytest.raises(ValueError, match="runs after the reduction"):
        check([early, full[1]])
    with pytest.raises(ValueError, match="0R0 is of unknown kind"):
        check([[*full[0], Action("R", 0, 0)], full[1]])
    with pytest.raises(ValueError, match="0B0 runs before the result of 1B0"):
        check(zero_bubble(2, 2))  # not lowered


def test_simulate_names_ranks_that_cannot_advance() -> None:
    program = one_f_one_b(2, 2)
    program[1].reverse()
    with pytest.raises(ValueError, match="cannot advance: rank 0 at 0B0, rank 1 at 1B1"):
        simulate(program, {"F": 1.0, "B": 2.0})
    with pytest.raises(ValueError, match="twice"):
        simulate([[Action("F", 0, 0), Action("F", 0, 0)]], {"F": 1.0})
    with pytest.raises(ValueError, match="two ranks"):
        simulate([[Action("F", 0, 0)], [Action("F", 0, 1)]], {"F": 1.0})
    with pytest.raises(ValueError, match="no rank runs stage 1"):
        simulate([[Action("F", 0, 0)], [Action("F", 2, 0)]], {"F": 1.0})
    with pytest.raises(ValueError, match="less than nothing"):
        simulate(gpipe(1, 1), {"F": -1.0, "B": 1.0})


def test_simulated_times_by_hand() -> None:
    """Two ranks, two micro-batches, hop 0.5, second stage twice as slow."""
    events = simulate(one_f_one_b(2, 2), lambda a: (1.0 if a.kind == "F" else 2.0) * (1 + a.stage), hop=0.5)
    starts = {str(e.action): (e.rank, e.start, e.end) for e in events}
    assert starts == {
        "0F0": (0, 0.0, 1.0),
        "0F1": (0, 1.0, 2.0),
        "1F0": (1, 1.5, 3.5),
        "1B0": (1, 3.5, 7.5),
        "0B0": (0, 8.0, 10.0),
        "1F1": (1, 7.5, 9.5),
        "1B1": (1, 9.5, 13.5),
        "0B1": (0, 14.0, 16.0),
    }
    assert [e.end for e in events] == sorted(e.end for e in events)
    assert bubble(events, 2) == pytest.approx(1 - (6 + 12) / 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dualpipe", 4, 8, 1), ["'dualpipe'", "gpipe, 1f1b, interleaved, zero-bubble"]),
        (("1f1b", 4, 8, 2), ["1f1b", "parallel.vpp=2", "parallel.schedule=interleaved"]),
        (("interleaved", 4, 6, 2), ["(6)", "parallel.pp=4", "4 or 8", "micro_batch_size", "parallel.schedule=1f1b"]),
        (("interleaved", 4, 3, 2), ["(3)", "to get 4 (", "train.global_batch_size"]),
        (("interleaved", 1, 8, 2), ["parallel.vpp=2", "parallel.pp=1"]),
        (("gpipe", 2, 0, 1), ["micro-batches a step=0"]),
        (("gpipe", 0, 1, 1), ["parallel.pp=0"]),
    ],
)
def test_build_errors_name_the_way_out(arguments: tuple[str, int, int, int], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def compositions(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [c for c in itertools.product(range(layers + 1), repeat=stages) if sum(c) == layers]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_balance_is_the_best_of_all_splits(stages: int) -> None:
    """Integer costs, so that ties are exact; first the maximum, then empty stages, then the whole profile of costs."""
    for layers, first, last in itertools.product(range(1, 8), (0, 1, 3, 9), (0, 1, 2, 5, 11)):
        for layer in (1, 2):

            def rating(
                counts: tuple[int, ...], layer: int = layer, first: int = first, last: int = last
            ) -> tuple[int, int, list[int]]:
                costs = [layer * n for n in counts]
                costs[0] += first
                costs[-1] += last
                empty = counts.count(0) if sum(counts) >= stages else 0
                return max(costs), empty, sorted(costs, reverse=True)

            best = min(map(rating, compositions(layers, stages)))
            assert rating(balance(layers, stages, layer, first, last)) == best, (layers, stages, layer, first, last)


def test_balance_as_users_see_it() -> None:
    assert balance(32, 1, 1.0, 0.1, 1.2) == (32,)
    assert balance(32, 4, 1.0, 0.0, 0.0) == (8, 8, 8, 8)
    assert balance(32, 4, 1.0, 0.1, 1.2) == (8, 8, 9, 7)
    assert balance(80, 8, 1.0, 0.05, 0.4) == (10,) * 8
    assert balance(10, 4, 1.0, 0.0, 0.0) == (2, 2, 3, 3), "later stages hold fewer activations"
    assert balance(9, 3, 1.0, 0.0, 5.0) == (4, 5, 0), "a head that weighs five layers stands alone"
    assert balance(2, 4, 1.0, 0.0, 0.0) == (0, 0, 1, 1), "fewer layers than stages"
    assert balance(3, 3, 1.0, 5.0, 4.0) == (0, 2, 1), "no stage is empty without need"


@pytest.mark.parametrize(
    "arguments", [(0, 1, 1.0, 0.0, 0.0), (1, 0, 1.0, 0.0, 0.0), (4, 2, 0.0, 1.0, 1.0), (4, 2, 1.0, -1.0, 0.0)]
)
def test_balance_rejects_nonsense(arguments: tuple[int, int, float, float, float]) -> None:
    with pytest.raises(ValueError):
        balance(*arguments)


def test_plot_tool(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "tools" / "plot_schedule.py"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    picture = tmp_path / "new" / "timeline.png"
    done = tool("--schedule", "all", "--pp", "2", "--micros", "2", "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = tool("--schedule", "interleaved", "--pp", "4", "--micros", "6", "--output", str(tmp_path / "none.png"))
    assert done.returncode == 2 and "divisible by parallel.pp=4" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "none.png").exists()


def test_the_face_is_free_of_torch() -> None:
    code = "import sys, megallama.pipeline; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
