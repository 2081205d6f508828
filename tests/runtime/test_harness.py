"""The spawn harness itself: results, reuse, and failures that are reported at once."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from distributed import RankError, Ranks, RankTimeout, run_ranks


def total(rank: int, world: int, x: float) -> tuple[int, int, float, int]:
    t = torch.tensor(x + rank)
    if world > 1:
        dist.all_reduce(t)
    return rank, world, t.item(), os.getpid()


def raise_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"planted on rank {rank}")
    dist.barrier()


def die_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        time.sleep(1000)
    dist.barrier()


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("two arguments in, one out")


def raise_unpicklable(rank: int, world: int) -> None:
    raise Unpicklable(1, 2)


def test_results_come_in_rank_order():
    answers = run_ranks(3, total, 1.0)
    assert [a[:3] for a in answers] == [(r, 3, 6.0) for r in range(3)]
    assert len({a[3] for a in answers} | {os.getpid()}) == 4


def test_one_rank_is_a_plain_call():
    assert run_ranks(1, total, 5.0) == [(0, 1, 5.0, os.getpid())]


def test_a_group_runs_many_functions_in_the_same_processes_and_recovers_from_a_failure():
    with Ranks(2) as ranks:
        first, second = (ranks.run(total, float(x)) for x in (1, 2))
        assert [a[3] for a in first] == [a[3] for a in second]
        with pytest.raises(ValueError, match="planted on rank 0"):
            ranks.run(raise_on, 0)
        assert [a[2] for a in ranks.run(total, 1.0)] == [3.0, 3.0]


def test_a_raising_rank_is_named_at_once_although_its_peers_wait_for_it():
    with Ranks(2) as ranks:
        ranks.run(total, 1.0)
        start = time.monotonic()
        with pytest.raises(ValueError, match="planted on rank 1") as caught:
            ranks.run(raise_on, 1)
    assert time.monotonic() - start < 5
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 2 failed first" in str(caught.value.__cause__) and "raise_on" in str(caught.value.__cause__)


def test_a_dead_rank_is_named():
    with pytest.raises(RankError, match="rank 1 of 2 failed first:\nthe process died: exit code 7"):
        run_ranks(2, die_on, 1)


def test_an_exception_that_does_not_pickle_still_arrives():
    with pytest.raises(RankError, match="two arguments in, one out"):
        run_ranks(2, raise_unpicklable)


def test_a_hanging_group_is_killed_and_every_stack_is_shown():
    with Ranks(2) as ranks:
        ranks.run(total, 1.0)
        start = time.monotonic()
        with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] of 2 not done after 1 s") as caught:
            ranks.run(hang_on, 1, timeout=1)
    assert time.monotonic() - start < 6
    assert "barrier" in str(caught.value) and "hang_on" in str(caught.value)
