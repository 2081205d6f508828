"""A small job that goes wrong as told; tests start it under real launchers: failing_job.py MODE [LOGS]."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megallama.runtime.faults import StopSignal, guard
from megallama.runtime.launch import World, connect, disconnect, rendezvous, resolve


def work(world: World, mode: str) -> None:
    bad = world.rank == world.size - 1
    if mode == "user":  # the same mistake on all ranks
        raise ValueError("data.sources is empty:\n  give at least one")
    if mode == "one" and bad:
        raise RuntimeError("planted")
    if mode == "zero" and world.rank == 0:  # the store's host, unless torchrun's agent is
        raise RuntimeError("planted")
    if mode == "interrupt" and bad:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if (mode == "kill" and bad) or (mode == "kill-zero" and world.rank == 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "late" and bad:  # all others have come to the end already
        time.sleep(1.5)
        raise RuntimeError("planted")
    if mode == "stop":
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            print(f"rank {world.rank} would save: {stop.name}", flush=True)
    if world.size > 1 and mode != "late":
        total = torch.tensor(1)
        dist.all_reduce(total)
        print(f"sum {total.item()}", flush=True)


def main() -> None:
    world = resolve(os.environ)
    store = rendezvous(world)
    mode, logs = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    with guard(world, store, lambda: f"stage {world.rank // 2}, step 17", logs):
        connect(world, store)
        work(world, mode)
    disconnect()
    print(f"left {world.launcher} {world.rank}/{world.size} {world.local_rank}/{world.local_size}", flush=True)


if __name__ == "__main__":
    main()
