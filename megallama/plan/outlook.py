"""What a run takes before it starts: time, energy, carbon, money, and how often to save when GPUs fail.

Failures are independent and arrive at a constant rate (exponential times between them); the first one anywhere stops
the whole job, which goes back to its newest durable checkpoint. A step takes as long as every other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from megallama.plan.cluster import Cluster

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
LEAST_GOODPUT = 0.01
"""Below it a run is no run: a hundred days for the work of one."""

LLAMA3_HOURS = 54 * 24 * 16384 / 419
"""GPU-hours between unexpected interruptions, of any cause, of Llama 3 405B: 419 in 54 days on 16,384 H100."""


class Emission(NamedTuple):
    """A model of the Llama 2 paper: `tonnes` of CO2 equivalent as printed."""

    model: str
    gpu_hours: int
    watts: float
    tonnes: float


PAPER = (
    Emission("7B", 184_320, 400, 31.22),
    Emission("13B", 368_640, 400, 62.44),
    Emission("34B", 1_038_336, 350, 153.90),
    Emission("70B", 1_720_320, 400, 291.42),
)
PAPER_TONNES = 539.00
"""The paper's table and its total: a PUE of 1.1, 0.385 kg a kWh, and every figure cut, not rounded, to two decimals.
The total is cut from the sum of the full values; the printed rows add up to 0.02 less."""


class Outlook(NamedTuple):
    """A run of `steps` steps of `step_seconds` on `gpus` GPUs of a cluster.

    Attributes:
        cluster: its watts, pue, carbon and price count here.
        goodput: share of the time that goes into steps that last; 1 = nothing fails and nothing is saved.
    """

    tokens: int
    steps: int
    step_seconds: float
    gpus: int
    cluster: Cluster
    goodput: float = 1.0

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.steps * self.step_seconds / self.goodput

    @property
    def days(self) -> float:
        return self.seconds / DAY

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / HOUR

    @property
    def mwh(self) -> float:
        """Of GPUs at their power limit all the time, times the building's PUE."""
        return self.gpu_hours * self.cluster.watts * self.cluster.pue / 1e6

    @property
    def tonnes(self) -> float:
        """Of CO2 equivalent; see `carbon_tonnes` for what they leave out."""
        return carbon_tonnes(self.gpu_hours, self.cluster.watts, self.cluster.pue, self.cluster.carbon)

    @property
    def price(self) -> float | None:
        """In the currency of cluster.price; None where that is not known."""
        return self.gpu_hours * self.cluster.price if self.cluster.price else None


class Reliability(NamedTuple):
    """How often GPUs fail and what saving and restarting take. The defaults are assumptions: measure your own.

    Attributes:
        gpu_mtbf_hours: GPU-hours between failures that stop the job, whatever fails; published for Llama 3 405B.
        save_seconds: how long a save holds training up. Assumed: 12 bytes a parameter of a 70B model (master weight and
            two moments) to shared storage at 30 GB/s, all of it while training waits.
        restart_seconds: from a failure to the first new step. Assumed: ten minutes to notice, replace the node, start
            all ranks and load.
        commit_seconds: from the begin of a save until it is durable, for saves in the background; None = save_seconds.
    """

    gpu_mtbf_hours: float = LLAMA3_HOURS
    save_seconds: float = 30.0
    restart_seconds: float = 600.0
    commit_seconds: float | None = None

    @property
    def lag_seconds(self) -> float:
        """From training on after a save until that save is durable."""
        return 0.0 if self.commit_seconds is None else self.commit_seconds - self.save_seconds


class Checkpoints(NamedTuple):
    """How often to save.

    Attributes:
        steps: between saves.
        seconds: that these steps take.
        best_seconds: the best interval were a step infinitely short and the run endless.
        failure_seconds: mean time between failures of the job.
        goodput: share of the time that goes into steps that last.
    """

    steps: int
    seconds: float
    best_seconds: float
    failure_seconds: float
    goodput: float


def carbon_tonnes(gpu_hours: float, watts: float, pue: float, kg_per_kwh: float) -> float:
    """Tonnes of CO2 equivalent of GPUs that draw `watts` for `gpu_hours`, as the Llama 2 paper counts them (`PAPER`).

    Left out: interconnect and switches, the hosts' CPUs, memory and disks, cooling beyond the PUE, and what making the
    hardware emitted.
    """
    return gpu_hours * watts / 1000 * pue * kg_per_kwh / 1000


def with_rates(
    cluster: Cluster, pue: float | None = None, carbon: float | None = None, price: float | None = None
) -> Cluster:
    """The cluster with a building, a grid or a price of one's own; None keeps the cluster's.

    Raises:
        ValueError: a PUE below 1, a carbon or a price below 0.
    """
    given: dict[str, Any] = {"pue": pue, "carbon": carbon, "price": price}
    return replace(cluster, **{name: rate for name, rate in given.items() if rate is not None})


def outlook_of(tokens: int, step_seconds: float, step_tokens: int, gpus: int, cluster: Cluster) -> Outlook:
    """The outlook of a run of `tokens` tokens, `step_tokens` a step (the last step is a whole one), if nothing fails.

    Raises:
        ValueError: an argument that is not more than 0.
    """
    _positive({"tokens": tokens, "step_seconds": step_seconds, "step_tokens": step_tokens, "gpus": gpus})
    return Outlook(tokens, -(-tokens // step_tokens), step_seconds, gpus, cluster)


def goodput(work: float, failure_seconds: float, reliability: Reliability) -> float:
    """Share of the time that goes into work that lasts, where a save follows every `work` seconds of it.

    With M = failure_seconds, c = save_seconds, r = restart_seconds and l = lag_seconds:

    1. A restart that a failure strikes starts over, so it takes R = M (e^(r/M) - 1) in the mean. From the end of one
       restart to the end of the next it takes M + R = M e^(r/M).
    2. In between, save j (from 0) becomes durable if there is no failure for w + c + l + j (w + c) seconds. The mean
       number of them is the geometric sum of e^(-(w + c + l)/M) e^(-j (w + c)/M): e^(-l/M) / (e^((w + c)/M) - 1).
    3. Each is worth w, so that w takes E = M e^((r + l)/M) (e^((w + c)/M) - 1) in the mean: the lag of saves in the
       background costs what a restart that is longer by it would. The share is w / E.

    Holds for w >= l: the next save waits until the last is durable.
    """
    period = work + reliability.save_seconds
    exponent = reliability.restart_seconds + reliability.lag_seconds + period
    # e^(period/M) - 1 is split into a factor in the exponent and one that cannot overflow.
    return work / failure_seconds * math.exp(-exponent / failure_seconds) / -math.expm1(-period / failure_seconds)


def best_interval(save_seconds: float, failure_seconds: float) -> float:
    """Seconds of work between saves that make `goodput` greatest; restarts and lag do not move it.

    The derivative of (e^((w + c)/M) - 1) / w is zero where x = w/M solves x - 1 + e^(-(x + c/M)) = 0, that is
    w = M (1 + W(-e^(-1 - c/M))) with Lambert's W. The left side is convex and rises with x, so that Newton's method
    goes down to the root from any point above it.
    """
    a = save_seconds / failure_seconds
    x = min(math.sqrt(2 * a), 1.0)
    for _ in range(50):
        residual = x + math.expm1(-(x + a))
        smaller = x + residual / math.expm1(-(x + a))
        if abs(smaller - x) <= 1e-12 * x:
            break
        x = smaller
    return x * failure_seconds


def best_checkpoints(outlook: Outlook, reliability: Reliability) -> Checkpoints:
    """The best interval in whole steps: the better neighbour of the best one in seconds, within the run.

    Saves in the background are never closer than what makes one durable.

    Raises:
        ValueError: a figure that is not more than 0, a save that is durable before it ends, or failures so frequent
            that next to nothing lasts.
    """
    _positive({name: value for name, value in reliability._asdict().items() if value is not None})
    if reliability.lag_seconds < 0:
        raise ValueError(
            f"commit_seconds={reliability.commit_seconds:g} must be at least save_seconds="
            f"{reliability.save_seconds:g}: both count from the begin of a save"
        )
    failure_seconds = reliability.gpu_mtbf_hours * HOUR / outlook.gpus
    best = best_interval(reliability.save_seconds, failure_seconds)
    step = outlook.step_seconds
    # The share rises up to the best interval and falls beyond it, so that limits apply to the neighbours alone.
    closest = max(1, math.ceil(reliability.lag_seconds / step))
    steps, share, endless = 0, -1.0, 0.0
    for neighbour in (math.floor(best / step), math.floor(best / step) + 1):
        wanted = max(neighbour, closest)
        endless = max(endless, goodput(wanted * step, failure_seconds, reliability))
        candidate = min(wanted, outlook.steps)
        if (lasting := goodput(candidate * step, failure_seconds, reliability)) > share:
            steps, share = candidate, lasting
    if endless < LEAST_GOODPUT:  # a short run's last save may take longer than the run, which is no matter
        raise ValueError(
            f"gpu_mtbf_hours={reliability.gpu_mtbf_hours:g} on {outlook.gpus:,} GPUs is a failure every "
            f"{_span(failure_seconds)}: at steps of {_span(step)}, saves of {_span(reliability.save_seconds)} and "
            f"restarts of {_span(reliability.restart_seconds)}, {100 * endless:.2g} % of the time would do work that "
            f"lasts; take fewer GPUs, or make saves and restarts shorter"
        )
    return Checkpoints(steps, steps * step, best, failure_seconds, share)


def effective(outlook: Outlook, reliability: Reliability) -> Outlook:
    """The same run, stretched by saves, restarts and work that is lost, at the best interval between saves."""
    return outlook._replace(goodput=best_checkpoints(outlook, reliability).goodput)


def record_of(outlook: Outlook, reliability: Reliability) -> dict[str, float | None]:
    """The outlook with failures, as an object of --json."""
    saves, real = best_checkpoints(outlook, reliability), effective(outlook, reliability)
    return {
        "tokens": real.tokens,
        "steps": real.steps,
        "step_seconds": real.step_seconds,
        "days_without_failures": outlook.days,
        "days": real.days,
        "gpu_hours": real.gpu_hours,
        "mwh": real.mwh,
        "tonnes_co2eq": real.tonnes,
        "price": real.price,
        "failure_hours": saves.failure_seconds / HOUR,
        "checkpoint_interval": saves.steps,
        "goodput": saves.goodput,
    }


def sentences(outlook: Outlook, reliability: Reliability) -> list[str]:
    """The outlook in plain lines: if nothing fails, how often to save, and with failures."""
    saves, cluster = best_checkpoints(outlook, reliability), outlook.cluster
    ideal, real = outlook._replace(goodput=1.0), effective(outlook, reliability)
    lines = [
        f"{outlook.tokens:,} tokens are {outlook.steps:,} steps of {_span(outlook.step_seconds)}: "
        f"{_span(ideal.seconds)} on {outlook.gpus:,} GPUs ({cluster.name}) if nothing fails",
        f"A failure every {_span(saves.failure_seconds)} is assumed, one in {_number(reliability.gpu_mtbf_hours)} "
        f"GPU-hours, with a restart of {_span(reliability.restart_seconds)}",
        f"A checkpoint every {saves.steps:,} steps = {_span(saves.seconds)} is best at "
        f"{_span(reliability.save_seconds)} a save: goodput {100 * saves.goodput:.1f} %",
        f"The run then takes {_span(real.seconds)}, {_number(real.gpu_hours)} GPU-hours and {_number(real.mwh)} MWh at "
        f"{cluster.watts:g} W a GPU and a PUE of {cluster.pue:g}",
        f"It emits {_number(real.tonnes)} tCO2eq at {cluster.carbon:g} kg a kWh, not counting interconnect, hosts, "
        f"cooling beyond the PUE and the making of the hardware",
    ]
    if real.price is None:
        lines.append("What it costs is not known: --price N is the price of a GPU-hour")
    else:
        lines.append(f"It costs {_number(real.price)} at {cluster.price:g} a GPU-hour")
    return lines


def _positive(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value:g} must be more than 0 and finite")


def _span(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("days", DAY), ("hours", HOUR), ("minutes", MINUTE)):
        if seconds >= 2 * length:
            return f"{_number(seconds / length)} {unit}"
    return f"{_number(seconds)} seconds"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
