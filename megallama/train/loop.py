"""The training loop: steps, validation, checkpoints, metrics; the same for every stage that trains on micro-batches."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint import Checkpointer
from megallama.data.loader import Loader
from megallama.data.ramp import BatchPlan
from megallama.pipeline.engine import Loss
from megallama.plan.cost import peak_tflops, train_flops_per_token
from megallama.runtime.faults import StopSignal
from megallama.runtime.metrics import Metrics, memory, throughput
from megallama.runtime.progress import Progress
from megallama.train.trainer import Stats, Trainer

SPIKE_WINDOW, SPIKE_SIGMAS = 64, 6.0


class SpikeDetector:
    """Notices a loss far above the recent ones: by SPIKE_SIGMAS standard deviations of the last SPIKE_WINDOW steps."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def __call__(self, loss: float) -> str | None:
        """A line about the spike, or None."""
        found = None
        if len(self.recent) >= SPIKE_WINDOW // 4:
            mean, spread = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > mean + SPIKE_SIGMAS * spread:
                found = f"loss spike: {loss:.4f}, recent mean {mean:.4f} ± {spread:.4f}"
        if math.isfinite(loss):
            self.recent.append(loss)
        return found


@dataclass
class Task:
    """What a stage gives to the loop.

    Attributes:
        loss: of one micro-batch.
        train: samples of the run.
        valid: held-out samples; None = no validation.
        fingerprints: of data and tokenizer, kept in checkpoints; a resumed run notes what has changed.
        stage: by its name on the command line.
        notes: lines to show at the start.
        report: more numbers about the held-out samples at each validation; None = the loss alone. Collective.
    """

    loss: Loss
    train: Loader
    valid: Loader | None
    fingerprints: dict[str, Any]
    stage: str = "pretrain"
    notes: tuple[str, ...] = ()
    report: Callable[[Trainer], dict[str, float]] | None = None


def tell_failed_saves(checkpointer: Checkpointer, step: int, progress: Progress) -> bool:
    """Note saves that failed; whether that of `step` is among them. Only rank 0 knows of any."""
    failures = checkpointer.failed()
    for failed, why in failures.items():
        progress.note(f"no checkpoint of step {failed}, the run goes on: {why}")
    return step in failures


class Loop:
    """Runs a trainer over a task's samples.

    Args:
        consumed: samples that the run has seen before.
        progress: where lines for people go; silent on all ranks but the first.
        metrics: where numbers go; None on all ranks but the first.
    """

    def __init__(
        self, trainer: Trainer, checkpointer: Checkpointer, consumed: int, progress: Progress, metrics: Metrics | None
    ):
        self.trainer, self.checkpointer, self.progress, self.metrics = trainer, checkpointer, progress, metrics
        self.config, self.mesh, self.consumed = trainer.config, trainer.mesh, consumed
        config, train = trainer.config, trainer.config.train
        self.plan = BatchPlan(train.global_batch_size, **(vars(train.ramp) if train.ramp else {}))
        self.spike, self.bad_steps = SpikeDetector(), 0
        name = torch.cuda.get_device_name() if self.mesh.device.type == "cuda" else ""
        self.peak = config.log.peak_tflops or peak_tflops(name, train.dtype)

    def run(self, task: Task) -> None:
        """From the step after `trainer.done` to train.steps or train.stop_after, or until a signal asks to stop."""
        train, last = self.config.train, self.config.train.stop_after or self.config.train.steps
        # Where a resumed run changed its batch size, samples go on where they stopped.
        shift = self.consumed - self.plan(self.trainer.done + 1)[0]
        steps = range(self.trainer.done + 1, min(last, train.steps) + 1)

        def samples(step: int) -> tuple[int, int]:
            first, size = self.plan(step)
            return first + shift, size

        if not steps:
            self.progress.note(f"nothing to do: step {self.trainer.done} of {train.steps} is done")
        batches = task.train.steps(steps, samples, self.mesh.dp.rank, self.mesh.dp.size, train.micro_batch_size)
        with StopSignal() as stop, batches, self._profiler() as tick:
            start = time.perf_counter()  # a step's time includes waiting for its data
            for step, micros in zip(steps, batches, strict=True):
                stats = self.trainer.step(micros, task.loss, bool(stop))
                record = self._record(step, stats, time.perf_counter() - start, task.train)
                if task.valid is not None and self._due(step, train.valid_interval, steps):
                    record["valid_loss"] = self.validate(task)
                    record |= task.report(self.trainer) if task.report else {}
                tell_failed_saves(self.checkpointer, self.trainer.done, self.progress)
                self._report(step, stats, record)
                tick()
                if self._due(step, self.config.checkpoint.interval, steps) or stats.stop:
                    self.save(task)
                if stats.stop:
                    self.progress.note(f"stopped by {stop.name or 'a signal on another rank'} after step {step}")
                    break
                start = time.perf_counter()
            self.checkpointer.wait()  # a second SIGTERM must not cut the last save off; a second Ctrl-C asks for that
        if tell_failed_saves(self.checkpointer, self.trainer.done, self.progress):
            raise ValueError(
                f"the last checkpoint, of step {self.trainer.done}, could not be written; once it can be, the same "
                f"command goes on from the one before"
            )
        if self.checkpointer.folder(self.trainer.done).is_dir():
            self.progress.note(f"checkpoint of step {self.trainer.done} in {self.checkpointer.root}")

    @staticmethod
    def _due(step: int, interval: int, steps: range) -> bool:
        return step == steps[-1] or (interval > 0 and step % interval == 0)

    def _record(self, step: int, stats: Stats, seconds: float, samples: Loader) -> dict[str, Any]:
        """The step's object in metrics.jsonl; tokens and FLOPs without padding."""
        size = self.plan(step)[1]
        volume = samples.volume(self.consumed, size)
        self.consumed += size
        flops = train_flops_per_token(self.config.model, volume.length)
        return {
            "step": step,
            "loss": stats.loss,
            "lr": stats.lr,
            "grad_norm": stats.grad_norm,
            "consumed_samples": self.consumed,
            "consumed_tokens": samples.volume(0, self.consumed).tokens,
            **throughput(volume.tokens, seconds, flops, self.mesh.world.size, self.peak),
            "memory_bytes": memory(self.mesh.device),
            **stats.metrics,
        }

    def _report(self, step: int, stats: Stats, record: dict[str, Any]) -> None:
        """Show and write a step, with what was strange about it under the key `event`."""
        self.progress.update(step, record)
        events = []
        if spike := self.spike(stats.loss):
            events.append(spike)
        if stats.skipped:
            events.append(f"gradient norm is {stats.grad_norm}: no rank changed its weights")
        for event in events:
            self.progress.note(f"step {step}: {event}")
        if self.metrics is not None:
            lost = self.metrics.write(record | ({"event": "; ".join(events)} if events else {}))
            if lost:
                self.progress.note(f"step {step}: {lost}")
        self.bad_steps = self.bad_steps + 1 if stats.skipped else 0
        if self.bad_steps >= self.config.train.max_bad_steps:
            self.checkpointer.wait()
            tell_failed_saves(self.checkpointer, self.trainer.done, self.progress)
            raise ValueError(
                f"{self.bad_steps} consecutive steps had non-finite gradients (train.max_bad_steps="
                f"{self.config.train.max_bad_steps}); lower optim.lr={self.config.optim.lr}, check the data, "
                f"or resume from an older checkpoint with checkpoint.load"
            )

    def validate(self, task: Task) -> float:
        """Mean loss over the first train.valid_steps global batches of the held-out samples; always the same ones."""
        assert task.valid is not None, "there are no held-out samples"
        train, dp = self.config.train, self.mesh.dp
        size = train.global_batch_size
        per_rank = size // (dp.size * train.micro_batch_size)
        batches = (
            task.valid.micros(n * size, dp.rank, dp.size, train.micro_batch_size, per_rank)
            for n in range(train.valid_steps)
        )
        return self.trainer.evaluate(batches, task.loss)

    def save(self, task: Task) -> None:
        """Write a checkpoint of the last step."""
        optimizer = self.trainer.optimizer
        assert optimizer is not None, "a frozen model has nothing to save"
        meta = {
            "consumed_samples": self.consumed,
            "updates": optimizer.updates,
            "fingerprints": task.fingerprints,
            "stage": task.stage,
        }
        self.checkpointer.save(self.trainer.done, optimizer.slots(), meta)

    @contextmanager
    def _profiler(self) -> Iterator[Callable[[], object]]:
        """A function to call after each step; inside train.profile's window a trace per rank is recorded."""
        window = self.config.train.profile
        if window is None:
            yield lambda: None
            return
        before = max(0, window.start - self.trainer.done - 1)  # steps of this process that come first
        active = window.stop - self.trainer.done - 1 - before
        if active <= 0:  # a resumed run has the window behind it
            yield lambda: None
            return
        folder = Path(self.config.output_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{self.mesh.world.rank:05d}.json"
        warmup = min(1, before)
        schedule = torch.profiler.schedule(wait=before - warmup, warmup=warmup, active=active, repeat=1)
        with torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(str(path))
        ) as trace:
            yield trace.step
        self.progress.note(f"profiler traces in {folder}")
