"""A run of PPO: opens models and prompts, resumes, iterates, validates, saves, and stops early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint import Checkpointer
from megallama.checkpoint.formats import StoreSource, check_export, write_hf
from megallama.config import Config
from megallama.data import read_prompts
from megallama.files import write_whole
from megallama.rlhf.judges import Scores
from megallama.rlhf.ppo.algorithm import Ppo, Progressed
from megallama.rlhf.ppo.models import CRITIC, Models, updates
from megallama.rlhf.ppo.rollout import Answered
from megallama.rlhf.prompts import TokenPrompt, tokenise
from megallama.runtime.faults import StopSignal
from megallama.runtime.mesh import Mesh
from megallama.runtime.metrics import Metrics, memory
from megallama.runtime.progress import Progress
from megallama.train.loop import tell_failed_saves
from megallama.train.models import identity
from megallama.train.run import of_weights, on_mesh, run_folder, tokenizer_of, write_config
from megallama.train.sources import chat_format, digest

BEST = "best"
"""Folder of the actor with the highest held-out reward."""


def run(config: Config) -> int:
    """Improve a policy as `config` says; returns the exit code. Every rank of the launch calls it."""
    config = of_weights(config, "ppo")
    _require(config)
    runs: list[PpoRun] = []
    with on_mesh(config, lambda: runs[0].where()) as mesh, run_folder(config, mesh):
        runs.append(PpoRun(config, mesh))
        runs[0].run()
    return 0


def _require(config: Config) -> None:
    """Rules of this stage that need nothing but the configuration."""
    ppo, train = config.ppo, config.train
    if ppo.prompts is None:
        raise ValueError("ppo.prompts is empty: name a file of prompts (docs/formats.md)")
    if ppo.rollouts % train.global_batch_size:
        raise ValueError(
            f"ppo.rollouts={ppo.rollouts} is not a multiple of the mini-batch train.global_batch_size="
            f"{train.global_batch_size}; choose such a multiple"
        )
    if train.steps < 1:
        raise ValueError("train.steps=0: ppo counts iterations in it; the paper's runs have 200 to 400")
    if train.ramp is not None:
        raise ValueError("train.ramp grows pretraining's batches; ppo has mini-batches of one size: set it to null")
    if ppo.patience and ppo.valid_prompts is None:
        raise ValueError(f"ppo.patience={ppo.patience} watches held-out prompts; name a file in ppo.valid_prompts")


class PpoRun:
    """One process's part in a run. Collective."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.folder, self.first = Path(config.output_dir), mesh.world.rank == 0
        self.form, ppo = chat_format(config), config.ppo

        def opened(path: str | None) -> list[TokenPrompt]:
            return tokenise(read_prompts(path), self.form, config.data.seq_length) if path else []

        prompts, valid = opened(ppo.prompts), opened(ppo.valid_prompts)
        files = [path for path in (ppo.prompts, ppo.valid_prompts) if path]
        self.fingerprints = {"format": self.form.fingerprint()} | {f"data {path}": digest(path) for path in files}
        self.models = Models(config, mesh)
        self.identities = {name: identity(source) for name, source in self.models.sources.items()}
        self.ppo = Ppo(config, self.models, self.form.tokenizer, prompts, valid)
        actor, critic, saves = self.models.actor, self.models.critic, config.checkpoint
        beside = {CRITIC: critic.config.model}
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints", mesh, actor.config.model, saves.keep, saves.async_save, beside
        )
        self.best = Checkpointer(self.folder / BEST, mesh, actor.config.model, keep=1)
        self.at = Progressed()
        if saves.export_hf and self.first:
            check_export(Path(saves.export_hf), tokenizer_of(config), actor.config.model)

    def where(self) -> str:
        """For messages about a failure."""
        return f"ppo, iteration {self.at.iteration + 1}"

    def run(self) -> None:
        """Resume if there is something to resume from, then iterate to the end."""
        notes: list[str] = []
        self._resume(notes.append)
        train, saves = self.config.train, self.config.checkpoint
        last = min(train.stop_after or train.steps, train.steps)
        with ExitStack() as stack:
            if self.mesh.world.size == 1:
                stack.callback(self.checkpointer.wait)
            if self.first:
                write_config(self.config)
            last_kept = self.at.iteration or -1  # a run that starts anew measures step 0 again
            metrics = stack.enter_context(Metrics(self.folder, last_kept)) if self.first else None
            every = self.config.log.interval
            progress = Progress(train.steps, self.at.iteration, every) if self.first else Progress.silent()
            stack.enter_context(progress)
            self.ppo.watch = progress.within
            stop = stack.enter_context(StopSignal())
            for line in notes:
                progress.note(line)
            if self.at.iteration == 0 and self.ppo.valid:  # what there is to beat
                self._note_metrics({"step": 0} | self._validate(progress), metrics, progress)
            while self.at.iteration < last and not self._exhausted(progress):
                iteration = self.at.iteration + 1
                record, skipped, asked = self.ppo.iterate(iteration, lambda: bool(stop))
                self.at.iteration = iteration
                record = self._head(iteration) | record
                # Whoever asks to stop may not wait for long.
                if self.ppo.valid and not asked and (iteration == last or _due(iteration, train.valid_interval)):
                    record |= self._validate(progress)
                self._report(record, skipped, metrics, progress)
                if asked or iteration == last or _due(iteration, saves.interval) or self._exhausted(None):
                    self._save()
                tell_failed_saves(self.checkpointer, iteration, progress)
                if asked:
                    progress.note(f"stopped by {stop.name or 'a signal on another rank'} after iteration {iteration}")
                    break
            self.checkpointer.wait()
            if tell_failed_saves(self.checkpointer, self.at.iteration, progress):
                raise ValueError(f"the last checkpoint, of iteration {self.at.iteration}, could not be written")
            if self.at.best_iteration or not math.isnan(self.at.best):
                progress.note(
                    f"best held-out reward {self.at.best:.4f} after iteration {self.at.best_iteration}: "
                    f"{self.best.folder(self.at.best_iteration)}"
                )
            self._export(progress)

    def _export(self, progress: Progress) -> None:
        """The best actor, or the last where none was held against prompts, in Hugging Face's format."""
        target = self.config.checkpoint.export_hf
        if target is None or not self.first or self.at.iteration < self.config.train.steps:
            return
        best = self.best.folder(self.at.best_iteration)
        source = StoreSource(best if best.is_dir() else self.checkpointer.folder(self.at.iteration))
        write_hf(source, Path(target), torch.bfloat16, tokenizer=tokenizer_of(self.config))
        progress.note(f"HF export of {source.folder.name} in {target}")

    def _head(self, iteration: int) -> dict[str, Any]:
        consumed = iteration * self.config.ppo.rollouts
        return {"step": iteration, "consumed_samples": consumed, "memory_bytes": memory(self.mesh.device)}

    def _exhausted(self, progress: Progress | None) -> bool:
        """Whether the held-out reward has not risen for ppo.patience validations."""
        patience = self.config.ppo.patience
        if not patience or self.at.stale < patience:
            return False
        if progress is not None:
            progress.note(f"stopped early: no better held-out reward in {self.at.stale} validations")
        return True

    def _validate(self, progress: Progress) -> dict[str, float]:
        record, answered, scores = self.ppo.validate()
        if not record["valid_reward"] <= self.at.best:  # the first has nothing to beat
            self.at.best, self.at.best_iteration, self.at.stale = record["valid_reward"], self.at.iteration, 0
            self.best.save(self.at.iteration, self.models.actor_weights(), self._meta())
            tell_failed_saves(self.best, self.at.iteration, progress)
        else:
            self.at.stale += 1
        if self.first:
            self._write_samples(answered, scores, progress)
        return record

    def _write_samples(self, answered: Answered, scores: Scores, progress: Progress) -> None:
        """The held-out answers, for people to read."""
        path = self.folder / "samples" / f"step_{self.at.iteration:08d}.jsonl"
        lines = []
        for n, (prompt, row) in enumerate(zip(answered.prompts, answered.rows, strict=True)):
            line = {
                "id": prompt.record.key,
                "messages": [{"role": m.role, "content": m.content} for m in prompt.record.messages],
                "answer": self.form.text(row[len(prompt.ids) :].tolist()),
                "finished": answered.finished[n],
                "reward": float(scores.combined[n]),
                "helpfulness": float(scores.helpfulness[n]),
                "safety": None if scores.safety is None else float(scores.safety[n]),
            }
            lines.append(json.dumps(line, ensure_ascii=False))
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "\n".join(lines) + "\n")
        except OSError as error:
            progress.note(f"no samples in {path}, the run goes on: {error.strerror}")

    def _report(self, record: dict[str, Any], skipped: bool, metrics: Metrics | None, progress: Progress) -> None:
        iteration = self.at.iteration
        progress.update(iteration, {key: record[key] for key in SHOWN if key in record})
        event = "a gradient was not finite: that step changed no weights" if skipped else None
        if event:
            progress.note(f"iteration {iteration}: {event}")
        self._note_metrics(record | ({"event": event} if event else {}), metrics, progress)
        self.at.bad = self.at.bad + 1 if skipped else 0
        if self.at.bad >= self.config.train.max_bad_steps:
            self.checkpointer.wait()
            raise ValueError(
                f"{self.at.bad} consecutive iterations had non-finite gradients (train.max_bad_steps="
                f"{self.config.train.max_bad_steps}); lower optim.lr={self.config.optim.lr}, or ppo.critic_lr"
            )

    def _note_metrics(self, record: dict[str, Any], metrics: Metrics | None, progress: Progress) -> None:
        if metrics is not None and (lost := metrics.write(record)):
            progress.note(f"iteration {self.at.iteration}: {lost}")

    def _meta(self) -> dict[str, Any]:
        actor, critic = self.models.actor.optimizer, self.models.critic.optimizer
        assert actor is not None and critic is not None, "both are trained"
        return {
            "consumed_samples": self.at.iteration * self.config.ppo.rollouts,
            "updates": actor.updates,
            "critic_updates": critic.updates,
            "fingerprints": self.fingerprints | self.identities,
            "stage": "ppo",
            "progressed": {key: None if value != value else value for key, value in asdict(self.at).items()},
        }

    def _save(self) -> None:
        self.checkpointer.save(self.at.iteration, self.models.slots(), self._meta())

    def _resume(self, note: Callable[[str], None]) -> None:
        """Go on from the newest valid checkpoint of actor and critic, which are one."""
        for checkpointer in (self.checkpointer, self.best):
            for line in checkpointer.sweep():
                note(line)
        models = self.models
        store = self.checkpointer.load_newest(lambda store: models.slots(), note)
        self.best.forget_after(store.manifest["progressed"]["best_iteration"] if store is not None else -1)
        if store is None:
            note(f"starting from the weights of {self.config.checkpoint.load}")
            return
        models.publish()
        manifest, steps = store.manifest, updates(self.config)
        for name, value in self.identities.items():
            if manifest["fingerprints"].get(name) != value:
                raise ValueError(
                    f"{name} was {manifest['fingerprints'].get(name)} when this run began, and is now {value}; a run "
                    f"keeps its models: name those, or set another output_dir"
                )
        state = manifest["progressed"]
        self.at = Progressed(**state | {"best": math.nan if state["best"] is None else state["best"]})
        for trainer, count in ((models.actor, manifest["updates"]), (models.critic, manifest["critic_updates"])):
            assert trainer.optimizer is not None, "both are trained"
            trainer.done, trainer.optimizer.updates = self.at.iteration * steps, count
        note(f"resumed from {store.folder}: iteration {self.at.iteration}")
        for name, value in self.fingerprints.items():
            if manifest["fingerprints"].get(name) != value:
                note(f"{name} has changed since that checkpoint was written")


SHOWN = (
    "step",
    "reward_mean",
    "valid_reward",
    "kl",
    "entropy",
    "clip_fraction",
    "value_loss",
    "length_mean",
    "finished",
    "grad_norm",
    "lr",
    "tokens_per_second",
)
"""Of a record, what the progress shows; metrics.jsonl has all."""


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
