"""A pipeline schedule is data: one list of actions for each pipeline rank, and pure functions over such lists.

Generators (`schedules.py`) emit compute only. `lower` adds the sends, receives and gradient reductions, `check` proves
that the result cannot deadlock, `simulate` times it, and the engine interprets it. Nothing here imports torch, so the
planner times the very programs that the engine runs.

Kinds of action:

    F   forward of a stage                     SF  send the stage's output to stage + 1
    B   backward; where W is split off, the    RF  receive the stage's input from stage - 1
        gradient of the input only             SB  send the gradient of the stage's input to stage - 1
    W   gradient of the weights                RB  receive the gradient of the stage's output from stage + 1
    G   reduce the stage's gradients over data-parallel ranks; once a step, its micro is 0

Between two stages of the same rank nothing is sent: the engine hands the tensor over.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

COMPUTE = frozenset("FBW")
KINDS = COMPUTE | {"SF", "RF", "SB", "RB", "G"}
TOWARDS = {"F": 1, "B": -1}  # which way the result of an action travels through the stages


class Action(NamedTuple):
    """One step of one rank: `kind` (see the table above) on model stage `stage` for micro-batch `micro`."""

    kind: str
    stage: int
    micro: int

    def __str__(self) -> str:
        """`2F5` is the forward of stage 2 for micro-batch 5."""
        return f"{self.stage}{self.kind}{self.micro}"


Program = list[list[Action]]  # indexed by pipeline rank
Cost = Mapping[str, float] | Callable[[Action], float]  # time of an action, by kind or in full; any unit


class Event(NamedTuple):
    """An action with the simulated time, in the unit of the costs, at which `rank` started and ended it."""

    action: Action
    rank: int
    start: float
    end: float


def needs(action: Action, stages: int) -> Action | None:
    """The action whose result `action` (F, B or W) consumes, or None for the first stage's forward.

    B consumes the gradient from the next stage; that it also needs its own F follows along the chain.
    """
    kind, stage, micro = action
    if kind == "F":
        return Action("F", stage - 1, micro) if stage > 0 else None
    if kind == "B":
        return Action("B", stage + 1, micro) if stage < stages - 1 else Action("F", stage, micro)
    if kind == "W":
        return Action("B", stage, micro)
    raise ValueError(f"{action} is no compute action; its kind must be F, B or W")


def partner(action: Action) -> Action:
    """The other end of a send or receive: SF of stage s meets RF of s + 1, SB of stage s meets RB of s - 1."""
    way, what = action.kind[0], action.kind[1]
    if way == "S":
        return Action("R" + what, action.stage + TOWARDS[what], action.micro)
    return Action("S" + what, action.stage - TOWARDS[what], action.micro)


def owners(program: Program) -> dict[int, int]:
    """Stage -> rank that runs it. Raises ValueError if ranks share a stage or the stages have a gap."""
    owner: dict[int, int] = {}
    for rank, row in enumerate(program):
        for stage in {action.stage for action in row}:
            if owner.setdefault(stage, rank) != rank:
                raise ValueError(f"stage {stage} stands on two ranks: {owner[stage]} and {rank}")
    if missing := set(range(max(owner, default=-1) + 1)) - set(owner):
        raise ValueError(f"no rank runs stage {min(missing)}, though there are stages up to {max(owner)}")
    return owner


def standard_cost(program: Program) -> dict[str, float]:
    """The usual proportions, in units of one forward: backward 2, of which W (where split off) is half."""
    split = any(action.kind == "W" for row in program for action in row)
    return {"F": 1.0, "B": 1.0, "W": 1.0} if split else {"F": 1.0, "B": 2.0}


def simulate(program: Program, cost: Cost, hop: float = 0.0) -> list[Event]:
    """Run every rank's compute actions in their order, in simulated time.

    An action starts when its rank is free and its input is there; an input from another rank takes `hop` longer.
    Communication overlaps compute, so the communication actions of a lowered program take no time of their own.

    Args:
        program: plain or lowered.
        cost: time of an action, not negative: a mapping from kind, or a function of the action (uneven stages).
        hop: time from the end of an action to the arrival of its result on another rank.

    Returns:
        The events by end time, each behind all that it depends on.

    Raises:
        ValueError: an action stands twice, costs less than nothing, or no rank can advance.
    """
    price = cost if callable(cost) else lambda action: cost[action.kind]
    rows = [[action for action in row if action.kind in COMPUTE] for row in program]
    owner = owners(rows)
    ends: dict[Action, float] = {}
    waiting: dict[Action, int] = {}  # action that is not done -> the rank that waits for it
    clock, cursor, runnable = [0.0] * len(rows), [0] * len(rows), deque(range(len(rows)))
    events: list[Event] = []
    while runnable:
        rank = runnable.popleft()
        while cursor[rank] < len(rows[rank]):
            action = rows[rank][cursor[rank]]
            need = needs(action, len(owner))
            if need is not None and need not in ends:
                waiting[need] = rank
                break
            if action in ends:
                raise ValueError(f"{action} stands twice in the program")
            if (duration := price(action)) < 0:
                raise ValueError(f"{action} costs {duration}, less than nothing")
            arrival = 0.0 if need is None else ends[need] + (hop if owner[need.stage] != rank else 0.0)
            start = max(clock[rank], arrival)
            clock[rank] = ends[action] = start + duration
            events.append(Event(action, rank, start, clock[rank]))
            cursor[rank] += 1
            if action in waiting:
                runnable.append(waiting.pop(action))
    _raise_if_stuck(rows, cursor, "the schedule cannot advance")
    # The sort is stable and `events` is causal, so actions that cost nothing stay behind what they depend on.
    return sorted(events, key=lambda event: event.end)


def lower(program: Program, cost: Cost | None = None) -> Program:
    """Add sends, receives and gradient reductions to a compute-only program.

    One global order (the simulated one) is walked from its start: each result that another rank consumes is sent right
    after its action, and received on the other rank at this same point of the order. Every rank's list is a projection
    of the global order, so the two ends of each transfer meet whatever blocks: no deadlock, for any real durations.

    A receive stands before the action that its rank is busy with when the data leaves, so a receive posted where it
    stands overlaps with that action. `cost` (default: `standard_cost`) only refines these places. `G` follows the
    stage's last B or W, behind the send of that B, which other ranks wait for.

    Raises:
        ValueError: as `simulate`.
    """
    owner = owners(program)
    left = Counter(action.stage for row in program for action in row if action.kind in ("B", "W"))
    lowered: Program = [[] for _ in program]
    for event in simulate(program, standard_cost(program) if cost is None else cost):
        action = event.action
        lowered[event.rank].append(action)
        if action.kind in TOWARDS:
            receiver = owner.get(action.stage + TOWARDS[action.kind], event.rank)
            if receiver != event.rank:
                send = Action("S" + action.kind, action.stage, action.micro)
                lowered[event.rank].append(send)
                lowered[receiver].append(partner(send))
        if action.kind in ("B", "W"):
            left[action.stage] -= 1
            if left[action.stage] == 0:
                lowered[event.rank].append(Action("G", action.stage, 0))
    return lowered


def check(program: Program) -> None:
    """Prove that a lowered program runs to its end even where every send and receive blocks till its partner is there.

    What completes under these strictest semantics also completes with buffered or asynchronous transfers. Also checked:
    each action's inputs are on its rank when it runs, nothing stands twice, and the gradients of each stage that has
    any are reduced once, after their last contribution.

    Raises:
        ValueError: what is wrong, and at which actions.
    """
    stages = len(owners(program))
    for rank, row in enumerate(program):
        _check_row(rank, row, stages)
    cursor, runnable = [0] * len(program), deque(range(len(program)))
    standing: dict[Action, int] = {}  # transfer -> the rank that blocks in it
    while runnable:
        rank = runnable.popleft()
        row = program[rank]
        while cursor[rank] < len(row):
            action = row[cursor[rank]]
            if action.kind[0] in "SR":
                peer = standing.pop(partner(action), None)
                if peer is None:
                    standing[action] = rank
                    break
                cursor[peer] += 1
                runnable.append(peer)
            cursor[rank] += 1
    _raise_if_stuck(program, cursor, "deadlock")


def _check_row(rank: int, row: list[Action], stages: int) -> None:
    """Raise ValueError unless every action of the row finds on its rank what it consumes."""
    seen: set[Action] = set()
    for action in row:
        kind, stage, micro = action
        wrong = ""
        if kind not in KINDS:
            wrong = f"is of unknown kind; the kinds are {', '.join(sorted(KINDS))}"
        elif action in seen:
            wrong = "stands twice"
        elif kind in COMPUTE:
            need = needs(action, stages)
            if need is not None and need not in seen and Action("R" + kind, stage, micro) not in seen:
                wrong = f"runs before the result of {need} is there"
            elif kind == "B" and Action("F", stage, micro) not in seen:
                wrong = "runs before its forward"
            elif Action("G", stage, 0) in seen:
                wrong = "runs after the reduction of its stage's gradients"
        elif kind[0] == "S" and Action(kind[1], stage, micro) not in seen:
            wrong = "sends what is not computed yet"
        if wrong:
            raise ValueError(f"rank {rank}: {action} {wrong}")
        seen.add(action)
    for stage in {action.stage for action in row if action.kind == "B"}:
        if Action("G", stage, 0) not in seen:
            raise ValueError(f"rank {rank}: {Action('G', stage, 0)} is missing: the gradients are never reduced")


def _raise_if_stuck(program: Program, cursor: list[int], what: str) -> None:
    at = [f"rank {rank} at {row[c]}" for rank, (row, c) in enumerate(zip(program, cursor, strict=True)) if c < len(row)]
    if at:
        raise ValueError(f"{what}: {', '.join(at)} (2F5 is F of stage 2, micro-batch 5)")


def bubble(events: list[Event], ranks: int) -> float:
    """Share of the ranks' time, from 0 to the last event's end, in which they idle."""
    span = max(event.end for event in events)
    return 1.0 - sum(event.end - event.start for event in events) / (span * ranks)


def peak_activations(program: Program, kept: float = 1) -> list[float]:
    """Most activations that each rank of a training program holds at once, in units of one stage's for one micro-batch.

    They are held from F to B. Where W is split off, the share `kept` of them (what the weight gradients read) stays
    until W; 1 is the upper bound.
    """
    peaks: list[float] = []
    for row in program:
        split = any(action.kind == "W" for action in row)
        change = {"F": 1, "B": kept - 1 if split else -1, "W": -kept}
        live: float = 0
        peak: float = 0
        for action in row:
            live += change.get(action.kind, 0)
            peak = max(peak, live)
        peaks.append(peak)
    return peaks
