"""How far a run has come: a live bar on a terminal, one plain line every few steps anywhere else (a log file).

with Progress(total=200, start=0, every=10) as progress:
    for step in range(1, 201):
        ...
        progress.update(step, record)          # a record of metrics.jsonl
        progress.note("checkpoint saved: …")   # a line above the bar
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WINDOW = 50
"""Steps over which a step's time is averaged for the ETA: long enough to be calm, short enough to follow a ramp."""
PLAIN_SECONDS = 10.0
"""Between two plain lines of a tool."""
FRAME = 0.1
"""Seconds at least between two pictures of the bar."""


def scaled(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def clock(seconds: float) -> str:
    """0:07, 3:05, 2:03:05 or 4d 02:03."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}:{m:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


class Field(NamedTuple):
    """How one key of a record is shown: a name before the value, or a unit after it."""

    name: str
    unit: str
    form: Callable[[float], str]


FIELDS = {
    "loss": Field("loss", "", "{:.4f}".format),
    "valid_loss": Field("valid", "", "{:.4f}".format),
    "lr": Field("lr", "", "{:.2e}".format),
    "grad_norm": Field("norm", "", "{:.3g}".format),
    "tokens_per_second": Field("", "tok/s", scaled),
    "tflops_per_device": Field("", "TFLOP/s", "{:.3g}".format),
    "mfu": Field("mfu", "", "{:.1%}".format),
    "memory_bytes": Field("", "GiB", lambda value: f"{value / 2**30:.3g}"),
}
"""What is shown, in this order; a stage's own keys follow."""
HIDDEN = {"step", "step_seconds", "consumed_samples", "consumed_tokens"}


def fields(record: Mapping[str, float | int | str | None]) -> list[tuple[str, str, str]]:
    """(name, value, unit) of everything in a record that is shown; what is not known (null) is not."""
    keys = [*(key for key in FIELDS if key in record), *(key for key in record if key not in FIELDS)]
    shown = []
    for key in keys:
        value = record[key]
        if key in HIDDEN or value is None:
            continue
        field = FIELDS.get(key, Field(key.replace("_", " "), "", "{:.4g}".format))
        shown.append((field.name, value if isinstance(value, str) else field.form(value), field.unit))
    return shown


class Progress:
    """Progress of steps start+1 … total.

    Args:
        total: last step of the run.
        start: steps already done (a resumed run).
        every: steps between plain lines; the bar follows every step.
        console: where to show it; default: standard output.
    """

    def __init__(self, total: int, start: int = 0, every: int = 1, console: Console | None = None) -> None:
        self._total, self._start, self._every = total, start, every
        self._console = console or Console(highlight=False)
        # Drawn by `update` alone, without a thread: what another rank writes about an error is not painted over.
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._began = time.monotonic()
        self._times = deque([self._began], maxlen=WINDOW + 1)
        self._drawn = 0.0
        self._last: tuple[int, Mapping[str, float | int | str | None]] = (start, {})
        self._within = ""  # how far the step under way has come

    @classmethod
    def silent(cls) -> Progress:
        """One that shows nothing, for the ranks that do not speak."""
        return cls(0, console=Console(quiet=True, force_terminal=False))

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        self._times = deque([self._began], maxlen=WINDOW + 1)
        if self._live is not None:
            self._live.start()
            self._live.update(self._picture(self._start, {}, self._began), refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of its own: above the bar, or between the plain lines."""
        self._say(text)

    def _say(self, text: str) -> None:
        """A run outlives the disk or the reader of its log; what no terminal can show is shown as its number."""
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        with suppress(OSError):
            self._console.print(Text(plain), soft_wrap=True)

    def update(self, step: int, record: Mapping[str, float | int | str | None]) -> None:
        """Step `step` is done and measured `record`."""
        now = time.monotonic()
        self._times.append(now)
        self._last = step, record
        if self._live is None:
            if step % self._every == 0 or step in (self._start + 1, self._total):
                self._say(self._plain(step, record, now))
        elif now - self._drawn >= FRAME or step >= self._total:
            self._drawn = now
            self._live.update(self._picture(step, record, now), refresh=True)

    @contextmanager
    def within(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A Watch inside of a step that takes long: below the bar, or a plain line every PLAIN_SECONDS."""
        done, began = 0, time.monotonic()
        told = began

        def report(more: int) -> None:
            nonlocal done, told
            done += more
            now = time.monotonic()
            if now - told < (PLAIN_SECONDS if self._live is None else FRAME):
                return
            told = now
            self._within = f"  {label} {done}/{total} | {done / (now - began):,.1f} a second"
            if self._live is None:
                self._say(self._within)
            else:
                self._live.update(self._picture(*self._last, now), refresh=True)

        try:
            yield report
        finally:
            self._within = ""

    def _left(self, step: int) -> float:
        """Seconds to the end, at the speed of the last steps."""
        steps = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / steps * (self._total - step) if steps else math.inf

    def _plain(self, step: int, record: Mapping[str, float | int | str | None], now: float) -> str:
        parts = [" ".join(filter(None, field)) for field in fields(record)]
        times = f"elapsed {clock(now - self._began)} | eta {clock(self._left(step))}"
        return " | ".join([f"step {step}/{self._total}", *parts, times])

    def _picture(self, step: int, record: Mapping[str, float | int | str | None], now: float) -> Group:
        head = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            head.add_column(ratio=ratio, no_wrap=True)
        head.add_row(
            Text.assemble("step ", (f"{step}/{self._total}", "bold")),
            ProgressBar(total=self._total, completed=step),
            Text.assemble(
                f"{step / self._total:4.0%}  ",
                (clock(now - self._began), "dim"),
                ("  eta ", "dim"),
                clock(self._left(step)),
            ),
        )
        cells = [
            Text.assemble((f"{name} " if name else "", "dim"), (value, "cyan"), (f" {unit}" if unit else "", "dim"))
            for name, value, unit in fields(record)
        ]
        return Group(head, *rows(cells, self._console.width), *([Text(self._within, "dim")] * bool(self._within)))


def rows(cells: list[Text], width: int) -> list[Text]:
    """Cells two columns apart, in as many rows as the width asks for; no cell is broken."""
    lines: list[Text] = []
    for cell in cells:
        if lines and len(lines[-1]) + 2 + len(cell) <= width:
            lines[-1].append("  ").append_text(cell)
        else:
            lines.append(cell)
    return lines


Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows work of a label and a number of things; yields what to tell how many more of them are done."""


def unwatched(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A Watch that shows nothing."""
    return nullcontext(lambda more: None)


def bytes_progress(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """For tools that go through `total` bytes: a live bar on a terminal, a line every few seconds elsewhere.

    Yields:
        What to tell how many bytes more are done, from any thread.
    """
    return _tool_progress(
        label, total, (DownloadColumn(), TransferSpeedColumn()), lambda rate: f"{rate / 1e6:,.0f} MB/s"
    )


def items_progress(label: str, total: int, shown: bool = True) -> AbstractContextManager[Callable[[int], None]]:
    """As `bytes_progress`, for `total` things of any kind.

    Args:
        shown: False for the ranks that do not speak.
    """
    return _tool_progress(
        label, total, (MofNCompleteColumn(), TimeRemainingColumn()), lambda rate: f"{rate:,.1f} a second", shown
    )


@contextmanager
def _tool_progress(
    label: str, total: int, columns: Sequence[ProgressColumn], speed: Callable[[float], str], shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar that ends with `columns`; a plain line ends with the `speed` of so many a second."""
    console, lock = Console(stderr=True, quiet=not shown), threading.Lock()
    started = last = time.monotonic()
    done = 0
    bars = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), *columns)
    with Bar(*bars, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def report(more: int) -> None:
            nonlocal done, last
            with lock:
                done += more
                bar.update(task, completed=done)
                now = time.monotonic()
                if not console.is_terminal and now - last >= PLAIN_SECONDS:
                    last = now
                    console.print(f"{label} {done / total:.1%}, {speed(done / (now - started))}", soft_wrap=True)

        yield report
