"""Pipeline parallelism: schedules are data (`schedules`, `program`), `balance` cuts the model into stages.

A schedule is a program, one list of actions a rank; `build` makes it, `lower` adds its communication, `simulate` times
it. `engine` runs it and is imported by its own name: this face stays free of torch, for the planner and `--help`.
"""

from megallama.pipeline.balance import balance
from megallama.pipeline.program import (
    Action,
    Cost,
    Event,
    Program,
    bubble,
    check,
    lower,
    needs,
    owners,
    partner,
    peak_activations,
    simulate,
    standard_cost,
)
from megallama.pipeline.schedules import (
    SCHEDULES,
    build,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble,
)

__all__ = [
    "SCHEDULES",
    "Action",
    "Cost",
    "Event",
    "Program",
    "balance",
    "bubble",
    "build",
    "check",
    "forward_only",
    "gpipe",
    "interleaved",
    "lower",
    "needs",
    "one_f_one_b",
    "owners",
    "partner",
    "peak_activations",
    "simulate",
    "standard_cost",
    "zero_bubble",
]
