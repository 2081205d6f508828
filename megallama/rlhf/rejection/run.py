"""Stage `rejection-sample` (the paper, section 3.2.3): K answers a prompt, scored, and the best of them to learn from.

Answers are sampled and scored in parts of rejection.part prompts, each written when it is complete; a killed run goes
on after its last one and ends with the same files. An answer's seed depends on nothing but train.seed, the prompt's
place in its file, the temperature's number and its own.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megallama.checkpoint.formats import Source
from megallama.config import SCALAR, Config
from megallama.data import Tokenizer, key, read_prompts
from megallama.inference.consolidate import generation_config, generation_mesh
from megallama.inference.generator import Generator
from megallama.inference.sampling import Answer, Request, Sampling
from megallama.rlhf.judges import Judges, combined, judge_source
from megallama.rlhf.parts import SETTINGS, Parts
from megallama.rlhf.prompts import TokenPrompt, tokenise
from megallama.rlhf.rejection.candidates import BAG, FORMAT, Candidate, read_bag, text_of
from megallama.rlhf.rejection.harvest import harvest
from megallama.runtime.exchange import from_first
from megallama.runtime.launch import resolve
from megallama.runtime.mesh import Mesh
from megallama.runtime.progress import Progress, Watch, unwatched
from megallama.train.models import adopt, frozen, identity, open_weights, without_batches
from megallama.train.residence import Residence
from megallama.train.run import on_mesh, run_folder, write_config
from megallama.train.sources import chat_format, digest


def run(config: Config) -> int:
    """Sample, score and pick as `config` says; returns the exit code. Every rank of the launch calls it."""
    source = open_policy(config)
    plain = without_batches(config, resolve(os.environ).size)
    runs: list[RejectionRun] = []
    with on_mesh(adopt(plain, source.model, source.folder), lambda: runs[0].where()) as mesh, run_folder(config, mesh):
        runs.append(RejectionRun(config, mesh))
        runs[0].run()
    return 0


def _require(config: Config) -> None:
    """Rules of this stage that need nothing but the configuration."""
    section, folder = config.rejection, Path(config.output_dir).resolve()
    if section.prompts is None:
        raise ValueError("rejection.prompts is empty: name a file of prompts (docs/formats.md)")
    if config.judges.helpfulness is None:
        raise ValueError("judges.helpfulness is empty: name a reward model (the output_dir of stage reward)")
    if any(Path(bag).resolve() == folder for bag in section.bags):
        raise ValueError(f"rejection.bags names output_dir={config.output_dir} itself; name folders of earlier runs")


def open_policy(config: Config) -> Source:
    """The model that samples; reads headers only.

    Raises:
        ValueError: rejection.model is missing, or writes no text.
    """
    if config.rejection.model is None:
        raise ValueError("rejection.model is empty: name the model that samples (a run, a checkpoint or an HF folder)")
    source = open_weights(config.rejection.model)
    if source.model.head == SCALAR:
        raise ValueError(f"rejection.model={config.rejection.model} is a reward model, which writes no answers")
    return source


class RejectionRun:
    """One process's part in a run, whose folder it owns. Collective.

    Args:
        config: without the policy's shape; judges may have another one.

    Raises:
        ValueError: a file, a record or a model is missing or does not fit.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.given, self.mesh, self.number = config, mesh, -1
        _require(config)
        section, longest = config.rejection, config.data.seq_length
        self.source = open_policy(config)
        self.general = without_batches(config, mesh.world.size)
        self.config = adopt(self.general, self.source.model, self.source.folder)
        self.form = chat_format(self.config)
        self.version = section.version or Path(str(section.model)).resolve().name
        self.prompts = tokenise(read_prompts(str(section.prompts)), self.form, longest)
        known = {prompt.record.key: prompt for prompt in self.prompts}
        self.bags = [read_bag(folder, n, self.form, known, longest) for n, folder in enumerate(section.bags)]
        self.judged_by = {
            name: judge_source(name, self.general, mesh.world.size, self.source.model.vocab_size)
            for name in ("helpfulness", "safety")
        }

    def where(self) -> str:
        """For messages about a failure."""
        return f"part {self.number}" if self.number >= 0 else ""

    def settings(self) -> dict[str, Any]:
        """All that the parts depend on, but the layout of the ranks."""
        section, judges = self.given.rejection, self.given.judges
        return {
            "rejection.model": identity(self.source),
            "rejection.version": self.version,
            "rejection.prompts": digest(str(section.prompts)),
            "rejection.samples": section.samples,
            "rejection.temperatures": section.temperatures,
            "rejection.max_new_tokens": section.max_new_tokens,
            "rejection.bags": [digest(str(Path(folder) / BAG)) for folder in section.bags],
            "rejection.part": section.part,
            **{f"judges.{name}": source and identity(source) for name, source in self.judged_by.items()},
            "judges.threshold": judges.threshold,
            "train.seed": self.given.train.seed,
            "train.dtype": self.given.train.dtype,
            "data.seq_length": self.given.data.seq_length,
            FORMAT: self.form.fingerprint(),
        }

    def run(self) -> None:
        """Make the parts that are missing, then all files."""
        section, first = self.given.rejection, self.mesh.world.rank == 0
        count = -(-len(self.prompts) // section.part)
        parts = self._parts(count) if first else None
        missing = from_first(lambda: parts.missing() if parts else [], self.mesh.world, self.mesh.device)
        if first:
            write_config(self.given)
        with Progress(count, count - len(missing)) if first else Progress.silent() as progress:
            if 0 < len(missing) < count:
                progress.note(f"{count - len(missing)} of {count} parts are there: going on")
            models = Models(self.general, self.config, self.source, self.form.tokenizer, self.mesh) if missing else None
            for done, self.number in enumerate(missing, count - len(missing) + 1):
                assert models is not None, "there is something to sample"
                start = time.perf_counter()
                places = range(self.number * section.part, min(len(self.prompts), (self.number + 1) * section.part))
                found = self.sample(models, places, progress.within)
                if parts is not None:
                    parts.write(self.number, [candidate._asdict() for candidate in found])
                    progress.update(done, self._report(found, done, time.perf_counter() - start))
            if parts is not None:
                records = [prompt.record for prompt in self.prompts]
                for line in harvest(parts, records, section, self.form):
                    progress.note(line)

    def _parts(self, count: int) -> Parts:
        """Settings bind a folder from its first part on: a run that failed before may be mended."""
        folder = Path(self.given.output_dir)
        if not any((folder / "parts").glob("*.jsonl")):
            (folder / SETTINGS).unlink(missing_ok=True)
        return Parts(folder, self.settings(), count)

    def _report(self, found: Sequence[Candidate], done: int, seconds: float) -> dict[str, float | str]:
        """What the progress shows of a part."""
        own = [candidate.combined for candidate in found if candidate.bag is None]
        prompts = min(done * self.given.rejection.part, len(self.prompts))
        return {
            "prompts": f"{prompts}/{len(self.prompts)}",
            "answers_per_second": len(own) / seconds,
            "reward_mean": math.fsum(own) / len(own),
        }

    def sample(self, models: Models, places: range, watch: Watch = unwatched) -> list[Candidate]:
        """The candidates of some prompts: of each those of the bags, then its new answers by temperature and number.

        Raises:
            ValueError: logits or scores are not finite.
        """
        requests = [request for place in places for request in self._requests(place)]
        answers = iter(zip(requests, models.answer(requests, watch), strict=True))
        found: list[tuple[TokenPrompt, Candidate]] = []
        for place in places:
            prompt, name = self.prompts[place], self.prompts[place].record.key
            found += [(prompt, bag[name]) for bag in self.bags if name in bag]
            for _ in self.given.rejection.temperatures:
                for n in range(self.given.rejection.samples):
                    request, answer = next(answers)
                    how = self.version, request.sampling.temperature, n, request.seed, answer.finish
                    text, log_prob = text_of(self.form, answer.ids), math.fsum(answer.log_probs)
                    found.append((prompt, Candidate(name, None, *how, text, answer.ids, log_prob)))
        return score(models.judges, found)

    def _requests(self, place: int) -> list[Request]:
        """For all answers to one prompt, by temperature and number."""
        section, ids = self.given.rejection, self.prompts[place].ids
        most = min(section.max_new_tokens, self.given.data.seq_length - len(ids))
        seeds = seeds_of(self.given.train.seed, place, len(section.temperatures), section.samples)
        return [
            Request(ids, seed, Sampling(most, temperature))
            for temperature, row in zip(section.temperatures, seeds, strict=True)
            for seed in row
        ]


class Models:
    """The policy in the generation layout and the judges in that of training; whoever is idle leaves the device.

    Args:
        general: the configuration without the policy's shape.
        config: with it.
    """

    def __init__(self, general: Config, config: Config, source: Source, tokenizer: Tokenizer, mesh: Mesh):
        tp = config.generate.tp or config.parallel.tp
        policy = frozen(generation_config(config, tp), generation_mesh(config, tp, mesh), source)
        self._residence = Residence(policy)
        self._generator = Generator(policy, tokenizer, config.generate.rows)
        self.judges = Judges(general, mesh, config.model.vocab_size)

    def answer(self, requests: Sequence[Request], watch: Watch) -> list[Answer]:
        with self._residence.reading():
            return self._generator.run(requests, watch=watch)


def seeds_of(seed: int, place: int, temperatures: int, samples: int) -> list[list[int]]:
    """A seed of 53 bits, which every reader of JSON keeps, for each answer to the prompt at `place` of its file."""
    words = key(seed, place, np.arange(temperatures)[:, None], np.arange(samples))
    return (words >> np.uint64(11)).astype(np.int64).tolist()


def score(judges: Judges, found: Sequence[tuple[TokenPrompt, Candidate]]) -> list[Candidate]:
    """The candidates with their scores. Equal answers to equal prompts are scored once: no rounding, which depends on
    what a batch holds, can prefer one of them. Collective.

    Raises:
        ValueError: a score is not finite; names the prompt.
    """
    numbers: dict[tuple[int, ...], int] = {}
    places = [numbers.setdefault((*prompt.ids, *candidate.ids), len(numbers)) for prompt, candidate in found]
    rows = [np.array(row, np.int64) for row in numbers]
    helpfulness = judges.helpfulness(rows)[places]
    safety = judges.safety(rows)[places] if judges.safety is not None else None
    for name, scores in (("helpfulness", helpfulness), ("safety", safety)):
        if scores is not None:
            _require_finite(name, scores, found)
    tagged = torch.tensor([prompt.record.is_safety for prompt, _ in found])
    rewards = combined(helpfulness, safety, tagged, judges.threshold).tolist()
    safe = safety.tolist() if safety is not None else [None] * len(found)
    return [
        candidate._replace(helpfulness=h, safety=s, combined=r)
        for (_, candidate), h, s, r in zip(found, helpfulness.tolist(), safe, rewards, strict=True)
    ]


def _require_finite(judge: str, scores: Tensor, found: Sequence[tuple[TokenPrompt, Candidate]]) -> None:
    bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        prompt = found[bad[0]][0].record
        raise ValueError(
            f"{len(bad)} of {len(found)} {judge} scores are not finite, the first that of an answer to prompt "
            f"{prompt.key!r} ({prompt.origin}); check the reward model judges.{judge}, or try train.dtype float32"
        )
