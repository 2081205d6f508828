"""The command line: one subcommand a stage, each imported only when it is asked for.

    python -m megallama STAGE --config FILE [--section.key value ...] [--dry-run [--world N]]

The same line runs under `torchrun`, `srun` and `mpirun`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from megallama import __version__, options
from megallama.config import Config, load
from megallama.presets import RECIPES


class Stage(NamedTuple):
    """`target` is "module:function", a function from a valid Config to the exit code."""

    summary: str
    target: str


STAGES: dict[str, Stage] = {
    "pretrain": Stage("train a model on tokenised text", "megallama.train.pretrain:run"),
    "sft": Stage("fine-tune a model on dialogues", "megallama.train.sft:run"),
    "reward": Stage("train a reward model on preference pairs", "megallama.train.reward:run"),
    "reward-eval": Stage("compare reward models on held-out pairs", "megallama.train.reward_eval:run"),
    "rejection-sample": Stage("sample answers and keep the best to fine-tune on", "megallama.rlhf.rejection.run:run"),
    "ppo": Stage("improve a chat model by proximal policy optimisation", "megallama.rlhf.ppo.run:run"),
    "generate": Stage("answer or continue prompts", "megallama.inference.generate:run"),
    "chat": Stage("talk to a model on the terminal", "megallama.inference.chat:run"),
    "verify": Stage("prove a layout: its gradients against those of one process", "megallama.train.verify:run"),
}

SHAPES = dict.fromkeys(set(STAGES) - {"pretrain", "verify"}, "megallama.train.run:planned")
"""Stages whose model comes from weights -> the function that --dry-run asks for it: "module:function", from
configuration, stage and number of ranks to the configuration."""

PLAN = "plan"

USAGE = """usage: megallama STAGE --config FILE [--section.key value ...] [--dry-run [--world N]]

  --config FILE           YAML file with the run's settings
  --section.key value     set one key; wins over the file
  --dry-run               check the settings, print layout, parameters and bytes a rank, and start nothing
  --world N               number of ranks that --dry-run plans for [WORLD_SIZE, else parallel.tp x parallel.pp]
"""

LINGER = 3.0
"""Seconds for which a rank outlives an error that all ranks find."""

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is; read here only to print a message once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: the stage's own, or 2 after a user's error (one line)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except ValueError as error:
        if is_first_rank():
            print(f"megallama: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if any(name in os.environ for name in RANK_VARIABLES):
            _wait_for_the_other_ranks()
        return 2


def overview() -> str:
    """The text of `megallama --help`."""
    stages = "\n".join(f"  {name:<18}{stage.summary}" for name, stage in STAGES.items())
    stages += f"\n  {PLAN:<18}know the best layout, memory and time of a run before it is queued"
    return f"{USAGE}\nstages:\n{stages}\n\n`megallama STAGE --help` lists every key with its type and [default]."


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its launch; a process without a launcher is."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"


def _wait_for_the_other_ranks() -> None:
    """Launchers end all ranks once one has failed. All find the same error, but not at the same time: the one that
    prints must not be cut off, and a rank that is told to end must still leave with its own exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(LINGER)


def _dispatch(name: str, arguments: list[str]) -> int:
    if name == PLAN:
        return _plan(arguments)
    if name not in STAGES:
        raise ValueError(f"unknown stage {name}; choose one of {', '.join((*STAGES, PLAN))}")
    if "-h" in arguments or "--help" in arguments:
        print(f"megallama {name}: {STAGES[name].summary}\n\n{USAGE}{options.describe(Config, RECIPES.get(name))}")
        return 0
    dry, world, rest = _own_flags(arguments)
    config = load(rest, name)
    if not dry:
        return _function(STAGES[name].target)(config)

    from megallama.plan import describe

    world = world or int(os.environ.get("WORLD_SIZE", config.parallel.tp * config.parallel.pp))
    if name in SHAPES:
        config = _function(SHAPES[name])(config, name, world)
    config.validate(world)
    if is_first_rank():
        print(describe(config, world, name))
    return 0


def _plan(arguments: list[str]) -> int:
    """Nothing runs, so it has options of its own and needs no ranks."""
    from megallama.plan import command

    if "-h" in arguments or "--help" in arguments:
        print(command.help_text())
        return 0
    return command.run(arguments)


def _own_flags(arguments: Sequence[str]) -> tuple[bool, int | None, list[str]]:
    """(--dry-run given, --world, what is left for the configuration)."""
    dry, world, rest, tokens = False, None, [], iter(arguments)
    for token in tokens:
        name, equals, value = token.partition("=")
        if token == "--dry-run":
            dry = True
        elif name == "--world":
            text = value if equals else next(tokens, "")
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"--world needs a number of ranks, got {text or 'nothing'}")
            world = int(text)
        else:
            rest.append(token)
    if world is not None and not dry:
        raise ValueError("--world plans for ranks that do not run: it needs --dry-run")
    return dry, world, rest


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
